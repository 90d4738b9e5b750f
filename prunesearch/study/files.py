"""Write files so that a reader never meets half of one, also when the writing process is killed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunesearch.study.errors import StudyError


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace the file as a whole. Safe when the process is killed, and when other processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # other users may work on the study, too
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
