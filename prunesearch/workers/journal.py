"""The embedded storage: Optuna's journal file, in which every line is checked.

A journal has one JSON object per line. Optuna numbers studies and trials by the order of the lines that create them, so that a
line that is lost or doubled would give every later trial another number, without an error. Therefore each line that is
written here ends with a check: the CRC-32 of the line before it and of its own text. Optuna ignores the additional key. Lines
without a check, which earlier versions and other programs write, are accepted.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from prunesearch.study.errors import StudyError
from prunesearch.study.files import naming

_CHECK = b',"check":"'  # is followed by eight hexadecimal digits, a quotation mark and the closing brace
_CHECK_LENGTH = len(_CHECK) + 8 + len(b'"}')
_FIRST = b'{"op_code":'  # every line begins like this
_BLOCK = 1 << 16  # bytes read at once in search of the last line's beginning

# Optuna's codes of the operations that are looked into
_CREATE_STUDY, _DELETE_STUDY, _CREATE_TRIAL = 0, 1, 4

# what a line may name: more than that was not created before it
_NAMES = ("study_id", "trial_id")


class JournalLock:
    """The journal's lock. The operating system releases it when its holder is killed; Optuna's own lock files would stay.

    A kill in the middle of a write leaves half a line. Once another worker has appended to it, the journal cannot be read any
    more. So each worker that takes the lock first cuts the file back to its last complete line.
    """

    def __init__(self, journal: Path):
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock")

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            with naming(self._journal), self._journal.open("rb+") as file:
                _cut_back(file)
        except OSError:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _last_line(file: BinaryIO, end: int) -> tuple[int, bytes]:
    """Where the last line of the file's first `end` bytes begins, and the line, with its line feed if it has one."""
    begin, line = end, b""
    while begin > 0:
        size = min(_BLOCK, begin)
        begin -= size
        file.seek(begin)
        line = file.read(size) + line
        if (found := line.rfind(b"\n", 0, len(line) - 1)) >= 0:
            return begin + found + 1, line[found + 1 :]
    return 0, line


def _cut_back(file: BinaryIO) -> None:
    """Remove a last line that was not written to its end: it has no line feed, or its text was never stored (NULs).

    A file of another kind, given by mistake, stays as it is.
    """
    begin, line = _last_line(file, file.seek(0, os.SEEK_END))
    is_complete = line.endswith(b"\n") and b"\0" not in line
    if line and not is_complete and _is_journal(file):
        file.truncate(begin)


def _is_journal(file: BinaryIO) -> bool:
    """Whether the file begins like a journal, or is empty."""
    file.seek(0)
    begin = file.read(len(_FIRST))
    return begin == _FIRST[: len(begin)]


class CheckedJournalFile(BaseJournalBackend):
    """Reads and appends the lines of a journal. Raises StudyError that names the first line that is damaged."""

    def __init__(self, journal: Path, lock: JournalLock | None):
        """`lock`: None for a journal that can be read only."""
        self._journal, self._lock = journal, lock
        self._begin()

    def _begin(self) -> None:
        self.number = self._offset = self._previous = 0  # lines read; where the next one begins; CRC of the last one
        self._studies: dict[int, str] = {}
        self._created = {"study_id": 0, "trial_id": 0}

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from < self.number:
            self._begin()
        with naming(self._journal), self._journal.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                raise self.damaged("the lines from here on are gone", self.number + 1)
            file.seek(self._offset)
            unread: ValueError | None = None
            for line in file:
                if unread is not None:  # not the last line: nobody is writing it at the moment
                    raise self.damaged(str(unread), self.number + 1)
                if not line.endswith(b"\n"):
                    return
                try:
                    log = self._parsed(line.rstrip(b"\r\n"))
                except ValueError as error:
                    unread = error
                    continue
                self._offset += len(line)
                self._previous = zlib.crc32(line.rstrip(b"\r\n"))
                self.number += 1
                if self.number > log_number_from:
                    yield log

    def check_kind(self) -> None:
        """Raises StudyError for a file that does not begin like a journal."""
        with self._journal.open("rb") as file:
            if not _is_journal(file):
                raise self.damaged("it is not a line of a journal", 1)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._lock is None:
            raise PermissionError(13, "Permission denied", str(self._journal))
        with self._lock, naming(self._journal), self._journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            previous = zlib.crc32(_last_line(file, end)[1].rstrip(b"\r\n"))
            lines = []
            for log in logs:
                text = json.dumps(log, separators=(",", ":")).encode()
                line = text[:-1] + _CHECK + b'%08x"}' % zlib.crc32(text, previous)
                previous = zlib.crc32(line)
                lines.append(line + b"\n")
            file.seek(end)
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def _parsed(self, line: bytes) -> dict[str, Any]:
        """The line's object. Raises ValueError, with the reason, for a line that is not whole or not in its place."""
        try:
            log = json.loads(line)
        except ValueError:  # includes UnicodeDecodeError
            raise ValueError("it is cut off, or is not JSON") from None
        if not isinstance(log, dict) or not isinstance(log.get("op_code"), int):
            raise ValueError("it is not a line of a journal")
        if "check" in log:
            text = line[:-_CHECK_LENGTH] + b"}"
            if log.pop("check") != f"{zlib.crc32(text, self._previous):08x}":
                raise ValueError("it was changed, or lines before it are missing or doubled")
        self._count(log)
        return log

    def _count(self, log: dict[str, Any]) -> None:
        """Follow what is created. Raises ValueError for a line that names what no line before it has created."""
        for name in _NAMES:
            if name in log and not (isinstance(log[name], int) and 0 <= log[name] < self._created[name]):
                raise ValueError(f"{name} {log[name]!r} is not known: lines before it are missing")
        if log["op_code"] == _CREATE_STUDY:
            if log.get("study_name") not in self._studies.values():
                self._studies[self._created["study_id"]] = str(log.get("study_name"))
                self._created["study_id"] += 1
        elif log["op_code"] == _DELETE_STUDY:
            self._studies.pop(log.get("study_id", -1), None)
        elif log["op_code"] == _CREATE_TRIAL and log.get("study_id") in self._studies:
            self._created["trial_id"] += 1

    def damaged(self, reason: str, line: int) -> StudyError:
        """The error for a line of the journal (the first one is line 1)."""
        fix = "restore the file from a copy; or move it away and launch the study again: candidates that have a record are kept"
        return StudyError([f"{self._journal}: line {line} is damaged ({reason}): {fix}"])


def open_journal(journal: Path) -> JournalStorage:
    """The storage in a journal file, which is created if it is missing.

    A journal that can be read but not written is opened, too; the first write to it raises PermissionError. Raises StudyError
    for a file that is no journal or damaged, and for one that cannot be read.
    """
    lock = JournalLock(journal)
    writable = True
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.touch()
        with lock:
            pass
    except OSError as error:
        if not os.path.isfile(journal) or not os.access(journal, os.R_OK):
            raise StudyError([f"storage.url: {journal} cannot be written ({error.strerror})"]) from None
        writable = False
    file = CheckedJournalFile(journal, lock if writable else None)
    try:
        file.check_kind()
        return JournalStorage(file)
    except (StudyError, OSError):
        raise
    except Exception as error:  # nothing of this process is in the journal yet: what Optuna cannot apply is damaged
        raise file.damaged(f"Optuna cannot apply it, {type(error).__name__}", file.number) from None
