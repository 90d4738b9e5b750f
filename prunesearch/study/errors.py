"""What a user is told about a study file that is wrong: one line for each mistake, all of them at once."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Tag, ValidationError


class StudyError(ValueError):
    """The user's study file, or what it points to, is wrong. `lines` holds one message for each mistake."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


def explained(error: ValidationError, raw: Any, root: type[BaseModel]) -> list[str]:
    """One line for each wrong key of `raw`, read as a `root`: key path, rule, value, nearest valid name."""
    # of a union, each member tells its own: the first one's word stands
    lines = {_path(e, raw): _explain(e, raw, root) for e in reversed(error.errors())}
    return list(lines.values())[::-1]


def _path(error: Any, raw: Any) -> str:
    """The key's path, without the names that pydantic gives a union's members, and without indices of what is no list."""
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


def _explain(error: Any, raw: Any, root: type[BaseModel]) -> str:
    """One line: key path, rule, value, nearest valid name."""
    path, (*parents, last) = _path(error, raw), error["loc"]
    if error["type"] == "extra_forbidden":
        fields = list(_section_at(parents, root).model_fields)
        near = difflib.get_close_matches(str(last), fields, n=1)
        return f"{path}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(fields)}")
    if error["type"] == "missing":
        return f"{path}: this key is required"
    rule = error["msg"].removeprefix("Value error, ")
    rule = rule.removeprefix("Input should be ") if error["type"] == "literal_error" else rule
    line = f"{path}: {rule[0].lower() + rule[1:]}"
    line += "" if ", got " in rule else f", got {error['input']!r}"
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(error["input"]), allowed, n=1)
        line = f"{path}: must be {error['ctx']['expected']}, got {error['input']!r}"
        line += f"; did you mean {near[0]!r}?" if near else ""
    return line


def _section_at(path: list[Any], root: type[BaseModel]) -> type[BaseModel]:
    """The section that a path, as pydantic gives it, leads to."""
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
    """The sections in a type, by the tag that a union knows them by, else by their own name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag or annotation.__name__, annotation
    tag = next((m.tag for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Tag)), tag)
    for inner in getattr(annotation, "__args__", ()):
        yield from _members(inner, tag)
