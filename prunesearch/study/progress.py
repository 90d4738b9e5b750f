"""The interface through which long work reports its progress: to a display, a log, or nothing."""

import sys
from typing import Protocol

from prunesearch.study.record import RunRecord


class ProgressListener(Protocol):
    """Receives progress reports. Methods may be called from more than one thread, and must not raise."""

    def progress(self, activity: str, done: int, total: int, /, worker: int = 0) -> None:
        """`done` of `total` units of an activity are finished; `worker` numbers the workers of this machine from 0."""

    def finished(self, record: RunRecord, finished: int, total: int, /) -> None:
        """A candidate has its record; `finished` of the study's `total` candidates have one."""

    def note(self, text: str) -> None:
        """A message for the user, one line."""


class NullListener:
    """Ignores all reports."""

    def progress(self, activity: str, done: int, total: int, /, worker: int = 0) -> None:
        pass

    def finished(self, record: RunRecord, finished: int, total: int, /) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def print_note(text: str) -> None:
    """Print a note if there is no listener: to stderr, since stdout may hold JSON."""
    print(text, file=sys.stderr)
