"""Errors in what the user gave, such as a study file: one line each, and all of them at once."""

import difflib
import errno
import os
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Tag, ValidationError


class StudyError(ValueError):
    """The study file, a file that it names, or a command's option is wrong.

    `lines` holds one message per error. Each says which key, file or option is wrong, the rule, the value, and the fix.
    The command line prints them to stderr and exits with 2.
    """

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What the operating system may refuse, and what the user can do about it. Other errors of files are ours: a missing file, for
# example, is looked for before it is read.
_FIXES = {
    errno.EACCES: "get the right to read or write it, or choose another place",
    errno.EPERM: "get the right to read or write it, or choose another place",
    errno.EROFS: "it lies on a file system that cannot be written: choose another place",
    errno.EISDIR: "a file is needed there: move the folder away",
    errno.ENOTDIR: "a folder is needed there: move the file away, or choose another place",
    errno.EEXIST: "a folder is needed there: move the file away, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the link points to itself: correct it",
    errno.EIO: "the disk or the network drive fails: restore the file, or try again later",
    errno.ESTALE: "the network drive was changed: mount it again",
    **dict.fromkeys(NO_SPACE, "free space there, and run the same command again: finished work is kept"),
}


def user_error_lines(error: BaseException) -> list[str] | None:
    """The lines to print for an error that the user can correct; None for an error in prunesearch.

    Errors of the user: StudyError, and files that the operating system refuses to read or write (no permission, a folder in
    place of a file, a full disk).
    """
    if isinstance(error, StudyError):
        return error.lines
    if not isinstance(error, OSError) or error.errno not in _FIXES or (error.filename is None and error.errno not in NO_SPACE):
        return None
    name = "the disk" if error.filename is None else os.fsdecode(error.filename)
    return [f"{name}: {error.strerror or os.strerror(error.errno)}: {_FIXES[error.errno]}"]


def describe_validation_error(error: ValidationError, raw: Any, root: type[BaseModel]) -> list[str]:
    """One line per wrong key: key path, rule, value and, for an unknown name, the nearest valid one.

    error: what pydantic raised when it read `raw` as a `root`.
    raw: the table from the TOML file.
    """
    # pydantic reports an error for each member of a union: reversed, so that the first member's message is the one kept
    lines = {_key_path(e, raw): _describe(e, raw, root) for e in reversed(error.errors())}
    return list(lines.values())[::-1]


def _key_path(error: Any, raw: Any) -> str:
    """The key's dotted path as the user wrote it, such as `data.train.0.text`.

    Leaves out union tags (in brackets), and an index where the user gave one value instead of a list.
    """
    shown = []
    for part in error["loc"]:
        if isinstance(part, int) and not isinstance(raw, list):
            continue
        if "[" not in str(part):
            shown.append(str(part))
            in_list = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
            inside = in_list or (isinstance(raw, dict) and part in raw)
            raw = raw[part] if inside else None
    return ".".join(shown)


def _describe(error: Any, raw: Any, root: type[BaseModel]) -> str:
    path, (*parents, last) = _key_path(error, raw), error["loc"]
    if error["type"] == "extra_forbidden":
        fields = list(_section_at(parents, root).model_fields)
        near = difflib.get_close_matches(str(last), fields, n=1)
        return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; valid keys: {', '.join(fields)}")
    if error["type"] == "missing":
        return f"{path}: this key is required"
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(error["input"]), allowed, n=1)
        line = f"{path}: must be {error['ctx']['expected']}, got {error['input']!r}"
        return line + (f"; did you mean {near[0]!r}?" if near else "")
    rule = error["msg"].removeprefix("Value error, ")
    line = f"{path}: {rule[0].lower() + rule[1:]}"
    return line if ", got " in rule else f"{line}, got {error['input']!r}"


def _section_at(path: list[Any], root: type[BaseModel]) -> type[BaseModel]:
    """The section of `root` at a pydantic error location."""
    section = root
    members: dict[str, type[BaseModel]] = {}
    for name in path:
        if name in members:
            section = members[name]
        elif name in section.model_fields:
            field = section.model_fields[name]
            members = dict(_members(field.annotation))
            section = next((a for tag, a in members.items() if tag == a.__name__), section)
    return section


def _members(annotation: Any, tag: str | None = None) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections inside a type annotation, each with its union tag, or its class name if it has no tag."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag or annotation.__name__, annotation
    tag = next((m.tag for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Tag)), tag)
    for inner in getattr(annotation, "__args__", ()):
        yield from _members(inner, tag)
