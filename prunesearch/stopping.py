"""Leaving in the middle of things, with nothing lost: asked by a signal, by who started this process, or by the study."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last one is what SLURM sends before it pre-empts


class Stopped(Exception):
    """Somebody asked this process to stop. `signal` is the number of the one that did, if any."""

    def __init__(self, signal: int | None = None):
        super().__init__(signal)
        self.signal = signal


class Taken(Exception):
    """The trial is no longer this worker's: it was slow for so long that it was given to another."""


class Event(Protocol):
    """threading's or multiprocessing's."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...


class Stop:
    """A request to stop at the next good moment. `event` may be shared between processes."""

    def __init__(self, event: Event | None = None):
        self._event = event or threading.Event()
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raises Stopped where it was requested."""
        if self.requested:
            raise Stopped(self.signal)

    @contextmanager
    def on_signals(self, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """The first signal requests the stop, a second one stops at once (KeyboardInterrupt)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            self._event.set()
            note("stopping: what is under way is kept; once more to stop at once")

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
