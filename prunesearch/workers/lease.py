"""Who evaluates a trial, and whether that worker still lives: on every storage alike, and without comparing clocks.

A worker leaves a mark on its trial, and changes it every few seconds. Whoever looks and sees the same mark for a minute
of its own clock takes the worker for gone. On the same machine, a process that has ended is seen at once. Optuna's own
heartbeats work with relational databases and `study.optimize` alone.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.study.interrupt import LeaseLost

BEAT_SECONDS = 10.0  # between two changes of a mark
LEASE_SECONDS = 60.0  # a mark that stays the same for so long is a lost worker's
WORKER = "worker:"  # begins the names of study attributes in which workers tell what they do
MOST_TIMES = {"crashed": 3, "lost": 20}  # then it is the candidate's fault


@cache
def place() -> str:
    """Where process ids mean something: this boot of this machine, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> float:
    """When a process began: on Linux in clock ticks since the boot, which no setting of a clock changes. Raises OSError."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return float(fields[19])
    except FileNotFoundError:
        return psutil.Process(pid).create_time()


@dataclass(frozen=True)
class Lease:
    """A mark: who, where, since when that process runs, how often renewed, and what it does."""

    host: str
    place: str
    pid: int
    started: float
    beat: int = 0
    renewed: float = 0.0  # seconds since 1970 by its own clock: for people to read, nothing is decided by it
    doing: str = ""
    done: int = 0
    of: int = 0

    @classmethod
    def mine(cls) -> "Lease":
        return cls(socket.gethostname(), place(), os.getpid(), _started(os.getpid()), renewed=round(time.time(), 1))

    @classmethod
    def of_trial(cls, trial: FrozenTrial) -> "Lease | None":
        stored = trial.user_attrs.get("lease")
        return cls(**stored) if stored else None

    def has_ended(self) -> bool:
        """Whether its process is known to be gone; from elsewhere, nobody can tell."""
        if self.place != place():
            return False
        try:
            process = psutil.Process(self.pid)
            return _started(self.pid) != self.started or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, OSError):
            return True


def tell_of_worker(study: optuna.Study, doing: str, done: int, of: int) -> None:
    """Leave word of what this process does while it has no trial (an anchor, a scan): for people to read."""
    mark = replace(Lease.mine(), doing=doing, done=done, of=of)
    study.set_user_attr(f"{WORKER}{mark.host}:{mark.pid}", asdict(mark))


def forget_worker(study: optuna.Study) -> None:
    """This process does nothing for the study any more."""
    mark = Lease.mine()
    if (name := f"{WORKER}{mark.host}:{mark.pid}") in study.user_attrs:
        study.set_user_attr(name, None)


class LeaseMonitor:
    """What one process has seen of the others' marks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks: dict[int, tuple[Any, float]] = {}  # by trial: its mark, and since when it is that
        self._looked: float | None = None
        self._lock = threading.Lock()

    def lost(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the running trials whose worker is gone.

        Whoever could not look for a while (it slept, or the storage was away, and nobody could leave a mark) begins anew.
        """
        with self._lock:
            now = self._clock()
            if self._looked is not None and now - self._looked > LEASE_SECONDS / 2:
                self._marks.clear()
            self._looked = now
            self._marks = {t._trial_id: self._seen(t, now) for t in running}
            return [t for t in running if self._is_lost(t, now)]

    def _seen(self, trial: FrozenTrial, now: float) -> tuple[Any, float]:
        mark = trial.user_attrs.get("lease")
        before = self._marks.get(trial._trial_id)
        return before if before and before[0] == mark else (mark, now)

    def _is_lost(self, trial: FrozenTrial, now: float) -> bool:
        lease = Lease.of_trial(trial)
        return (lease is not None and lease.has_ended()) or now - self._marks[trial._trial_id][1] >= LEASE_SECONDS


def end_lost(study: optuna.Study, watch: LeaseMonitor, trials: Sequence[FrozenTrial] | None = None) -> list[str]:
    """End the running trials whose worker is gone, so that they are evaluated again; returns their candidates' keys.

    `trials` are the study's, where somebody has just read them.
    """
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    running = [t for t in trials if t.state == TrialState.RUNNING]
    return [t.user_attrs.get("candidate", "") for t in watch.lost(running) if give_up(study, t, "lost")]


def give_up(study: optuna.Study, trial: FrozenTrial, why: str, reason: str | None = None) -> bool:
    """End a running trial without an outcome, for another worker to evaluate its candidate: it was `lost`, `crashed` or `handed
    back`, or it is a `duplicate`. A candidate that workers are lost over, again and again, has failed.

    False where somebody has ended the trial before: of several that try, one succeeds.
    """
    key = trial.user_attrs.get("candidate")
    ended: list[str | None] = []
    for t in study.get_trials(deepcopy=False) if key else []:
        if t.user_attrs.get("candidate") == key:
            ended = [] if "retry" in t.user_attrs else ended  # what was before does not count
            ended.append(t.user_attrs.get("ended"))
    if why in MOST_TIMES and ended.count(why) + 1 >= MOST_TIMES[why]:
        reason = f"{why} {MOST_TIMES[why]} times" + (f": {reason}" if reason else "")
        why = "failed"
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "ended", why)
        if reason:
            study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


class LeaseHolder:
    """A trial that this process evaluates."""

    def __init__(self, storage: BaseStorage, trial_id: int, mark: Lease | None = None):
        self._storage, self._trial_id = storage, trial_id
        self.key = ""  # its candidate's, once that is known
        self._mark = mark or Lease.mine()
        self._doing: tuple[str, int, int] = "", 0, 0
        self._lock = threading.Lock()
        self._taken = threading.Event()

    def renew(self) -> None:
        """Change the mark. A trial that has ended in the meantime was taken away."""
        with self._lock:
            doing, done, of = self._doing
            self._mark = replace(
                self._mark, beat=self._mark.beat + 1, renewed=round(time.time(), 1), doing=doing, done=done, of=of
            )
            try:
                self._storage.set_trial_user_attr(self._trial_id, "lease", asdict(self._mark))
            except UpdateFinishedTrialError:
                self._taken.set()

    def does(self, what: str, done: int, of: int) -> None:
        """Remember for the next mark what is being done."""
        self._doing = what, done, of

    def check(self) -> None:
        """Raises LeaseLost where it is known that the trial was given to another."""
        if self._taken.is_set():
            raise LeaseLost

    def make_sure(self) -> None:
        """Ask the storage. Raises LeaseLost. To be called before anything is written that others read."""
        self.renew()
        self.check()


@contextmanager
def kept(
    held: LeaseHolder,
    look: Callable[[], object],
    first: Callable[[], object] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Renew a trial's mark in the background. Beside that, in a thread of its own that may be slow: something to do `first`,
    and a look at what the others do, each time. What goes wrong there does not end the trial; `note` is told."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            held.renew()

    def aside() -> None:
        todo = first
        while True:
            try:
                todo()
            except UpdateFinishedTrialError:  # it was taken away: the next mark will tell
                pass
            except Exception as error:
                note(f"beside a trial: {type(error).__name__}: {error}")
            if over.wait(BEAT_SECONDS):
                return
            todo = look

    threads = [threading.Thread(target=work, daemon=True, name=work.__name__) for work in (beat, aside)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(timeout=BEAT_SECONDS)  # they may be waiting for a storage that is away
