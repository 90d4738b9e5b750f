"""Leaving in the middle of things, with nothing lost: asked by a signal, by who started this process, or by the study."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from filelock import FileLock, Timeout

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last one is what SLURM sends before it pre-empts


class Interrupted(Exception):
    """Somebody asked this process to stop. `signal` is the number of the one that did, if any."""

    def __init__(self, signal: int | None = None):
        super().__init__(signal)
        self.signal = signal


class LeaseLost(Exception):
    """The trial is no longer this worker's: it was slow for so long that it was given to another."""


class Flag(Protocol):
    """A byte that processes may share, such as `multiprocessing.RawValue("b")`. An Event would not do: it has a lock, which a
    signal's handler would wait for within its own process, and which a killed process would take along."""

    value: int


@dataclass
class _OwnFlag:
    value: int = 0


class Interrupt:
    """A request to stop at the next good moment. `flag` may be shared between processes."""

    def __init__(self, flag: Flag | None = None):
        self._flag = flag or _OwnFlag()
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return bool(self._flag.value)

    def request(self) -> None:
        self._flag.value = 1

    def check(self) -> None:
        """Raises Interrupted where it was requested."""
        if self.requested:
            raise Interrupted(self.signal)

    @contextmanager
    def on_signals(self, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """The first signal requests the stop; Ctrl-C after one stops at once (KeyboardInterrupt)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is None:
                self.signal = number
                self.request()
                note("stopping: what is under way is kept; Ctrl-C to stop at once")
            elif number == signal.SIGINT:
                raise KeyboardInterrupt

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def locked(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """A lock on a file, waited for as long as `check` lets it. The operating system frees it when its holder ends."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            check()
    try:
        yield
    finally:
        lock.release()
