"""Who is told how it goes: a progress display, a log, or nobody."""

from typing import Protocol

from prunesearch.study.record import RunRecord


class ProgressListener(Protocol):
    """Is told of every step, every finished candidate, and what else happens."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None: ...

    def finished(self, record: RunRecord, settled: int, of: int) -> None: ...

    def note(self, text: str) -> None: ...


class NullListener:
    """Is told everything and says nothing."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        pass

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
