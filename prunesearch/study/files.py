"""Files of a study: written so that a reader never sees a partial one, and read whole or named."""

import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from prunesearch.study.errors import StudyError

T = TypeVar("T")


class NotWritable(StudyError):
    """A folder, or a file in it, cannot be written. `reason`: what the operating system says."""

    def __init__(self, folder: Path, reason: str):
        super().__init__([f"{folder} must be a folder that can be written to: {reason}; choose another one"])
        self.reason = reason


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of the file or folder. A full disk, for example, is reported by Python without it,
    and by the libraries written in Rust, such as safetensors and tokenizers, as an error of their own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Delete the folder again if the block, which creates it or fills it, fails."""
    try:
        with naming(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_json(path: Path, kind: type[T], fix: str) -> T:
    """The value in a JSON file. Raises StudyError, with the rule that the file breaks and the fix, for a damaged file.

    kind: a pydantic model, a dataclass, or a type such as `dict[str, int]`.
    fix: what the user can do, such as `restore it from a copy, or delete it`.
    """
    content = path.read_bytes()
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        raise StudyError([f"{path}: {_why_invalid(content, error)}: {fix}"]) from None


def read_unless_damaged(path: Path, kind: type[T]) -> T | None:
    """As `read_json`, of a file that can be made again: None if it is missing or damaged. A note tells about a damaged one."""
    if not path.exists():
        return None
    try:
        return read_json(path, kind, "it is made again")
    except StudyError as error:
        print(error, file=sys.stderr)  # stdout may hold JSON
        return None


def _why_invalid(content: bytes, error: ValidationError) -> str:
    if not content.strip(b"\0 \t\r\n"):
        return "the file is empty"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "the file is cut off, or is not JSON"
    key = ".".join(map(str, first["loc"]))
    return f"the file has other content than expected ({f'{key}: ' if key else ''}{first['msg'].splitlines()[0]})"


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that other processes see all of it or none of it, even if this process is killed while writing.

    A new file has the permissions that `open` would give it (the umask applies), so that a group that shares a study folder
    can be given write access.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without an error, move the files in it into `folder`.

    Creates `folder`. Raises NotWritable where nothing can be written there, or where the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # inside the folder, so that moving a file never crosses file systems
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".staged.")
    except OSError as error:
        raise NotWritable(folder, error.strerror or str(error)) from error
    with temporary as name:
        staged = Path(name)
        try:
            yield staged
            for file in staged.iterdir():
                os.replace(file, folder / file.name)
        except OSError as error:
            raise NotWritable(folder, error.strerror or str(error)) from error
