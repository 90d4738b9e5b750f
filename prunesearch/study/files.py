"""Write files so that a reader never sees a partial file, even if the writing process is killed."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunesearch.study.errors import StudyError


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that other processes see all of it or none of it, even if this process is killed while writing.

    A new file has the permissions that `open` would give it (the umask applies), so that a group that shares a study folder
    can be given write access.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
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

    Creates `folder`. Raises StudyError where nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # inside the folder, so that moving a file never crosses file systems
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".staged.")
    except OSError as error:
        raise StudyError([f"{folder} must be a folder that can be written to: {error.strerror}; choose another one"]) from error
    with temporary as name:
        staged = Path(name)
        yield staged
        for file in staged.iterdir():
            os.replace(file, folder / file.name)
