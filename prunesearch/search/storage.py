"""Optuna storage from a URL, or a journal file that a kill cannot spoil."""

import logging
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from prunesearch.mistakes import StudyError

logging.getLogger("filelock").setLevel(logging.WARNING)


class _MendingLock(JournalFileOpenLock):
    """The journal's lock. The operating system releases it when its holder is killed; Optuna's own lock files stay.

    A kill in the middle of a write leaves half a line, after which Optuna cannot read the journal any more once somebody
    has appended to it. So whoever takes the lock first cuts the file back to its last whole line.
    """

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(url: str | None, run_folder: Path) -> BaseStorage:
    """The storage at the URL; without one, `journal.log` in the run folder. Raises StudyError when it cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None or url.startswith("journal://"):
        journal = Path(url.removeprefix("journal://")) if url else run_folder / "journal.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.touch()
        lock = _MendingLock(journal)
        lock.acquire()
        lock.release()
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:
        if "://" not in url:
            fix = "such as sqlite:///study.db, journal:///path/journal.log or postgresql+psycopg://…"
            raise StudyError([f"storage.url: must be a URL, {fix}, got {url!r}"]) from None
        shown = url.split("://")[0] + "://…"  # a URL may hold a password
        reason = f"{type(error).__name__}: {error}".splitlines()[0].replace(url, shown)
        raise StudyError([f"storage.url: {shown} cannot be opened ({reason})"]) from error
