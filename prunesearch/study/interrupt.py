"""Requests to stop without loss of work: from a signal, from the process that started this one, or from `abort`.

Long work calls `Interrupt.check` often. It raises Interrupted after a request; the work then saves its state and ends.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from filelock import FileLock, Timeout

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # SLURM sends SIGUSR1 before a job's time is over
LOCK_POLL_SECONDS = 0.5


class Interrupted(Exception):
    """This process was asked to stop. `signal` is the number of the signal that asked, or None if no signal did."""

    def __init__(self, signal: int | None = None):
        super().__init__(signal)
        self.signal = signal

    def __str__(self) -> str:
        return "asked to stop" + (f" by signal {self.signal}" if self.signal is not None else "")


class LeaseLost(Exception):
    """This worker no longer holds the lease on its trial: it was unresponsive for too long, and another worker took over.

    `candidate` is the key of the trial's candidate, or None if it is not known here.
    """

    def __init__(self, candidate: str | None = None):
        super().__init__(candidate)
        self.candidate = candidate

    def __str__(self) -> str:
        return f"the lease on {self.candidate or 'the trial'} was lost to another worker"


class Flag(Protocol):
    """A shared number: 0, or 1 once a stop is requested. Processes may share `multiprocessing.RawValue("b")`.

    Not a multiprocessing.Event, because an Event has a lock: a signal handler would wait for the lock that its own process
    holds, and a killed process would never release it.
    """

    value: int


@dataclass
class _LocalFlag:
    value: int = 0


class Interrupt:
    """A request to stop at the next safe point.

    flag: where the request is stored. Processes that are given the same flag stop together. Default: a flag of this
        object's own.
    """

    def __init__(self, flag: Flag | None = None):
        self._flag = flag or _LocalFlag()
        self.signal: int | None = None  # the first signal that this process received within `on_signals`

    @property
    def requested(self) -> bool:
        return bool(self._flag.value)

    def request(self) -> None:
        self._flag.value = 1

    def check(self) -> None:
        """Raises Interrupted after a request."""
        if self.requested:
            raise Interrupted(self.signal)

    @contextmanager
    def on_signals(self, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and SIGUSR1 while the context is open.

        The first signal requests a stop and is reported to `note`; a Ctrl-C after it raises KeyboardInterrupt at once. Does
        nothing outside the main thread, where Python allows no signal handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is None:
                self.signal = number
                self.request()
                note("stopping: the work in progress is being saved; press Ctrl-C to stop at once")
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
    """Hold the lock file `path`, which the operating system releases if this process ends.

    While another process holds it, `check` is called every 0.5 s; an exception from `check` ends the wait.
    """
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            break
        except Timeout:
            check()
    try:
        yield
    finally:
        lock.release()
