"""Leases: which process evaluates a trial, and whether that process is still alive.

A worker writes a heartbeat to its trial every few seconds. If an observer sees an unchanged heartbeat for 60 s (on its own
clock), it treats the worker as dead; so the clocks of machines need not agree. On the same machine, a process that has ended is
noticed at once. This works on every storage. Optuna's own heartbeats need a relational database and `study.optimize`
(optuna/optuna issue 3293).
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

import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from prunesearch.search.study_progress import is_foreign
from prunesearch.study.interrupt import LeaseLost
from prunesearch.workers.optuna_internals import AnyTrial, StoredStudy
from prunesearch.workers.urls import redacted

HEARTBEAT_SECONDS = 10.0  # between two heartbeats
LEASE_SECONDS = 60.0  # a heartbeat that has not changed for so long belongs to a dead worker
WORKER = "worker:"  # begins the names of study attributes in which workers tell what they do
ATTEMPTS = {"crashed": 3, "lost": 20}  # after so many, the candidate itself has failed


@cache
def pid_namespace() -> str:
    """Where process ids mean the same: this boot of this machine, in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_of(pid: int) -> float:
    """When a process started. On Linux in clock ticks since boot, which changes of the clock do not affect. Raises OSError."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return float(fields[19])
    except FileNotFoundError:
        return psutil.Process(pid).create_time()


@dataclass(frozen=True)
class Lease:
    """A heartbeat as it is stored: the process, its number of renewals, and what the process is doing."""

    host: str
    place: str  # the process id's namespace
    pid: int
    started: float
    beat: int = 0
    renewed: float = 0.0  # seconds since the epoch, on the worker's clock: for people to read
    doing: str = ""
    done: int = 0
    of: int = 0

    @classmethod
    def mine(cls) -> "Lease":
        """A new lease of this process."""
        return cls(socket.gethostname(), pid_namespace(), os.getpid(), _start_of(os.getpid()), renewed=round(time.time(), 1))

    @classmethod
    def of_trial(cls, trial: FrozenTrial) -> "Lease | None":
        stored = trial.user_attrs.get("lease")
        return cls(**stored) if stored else None

    def has_ended(self) -> bool:
        """Whether its process is known to have ended; False for every process of another machine or container."""
        if self.place != pid_namespace():
            return False
        try:
            process = psutil.Process(self.pid)
            return _start_of(self.pid) != self.started or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, OSError):
            return True


def announce_worker(stored: StoredStudy, doing: str, done: int, of: int) -> None:
    """Store what this process does while it has no trial (an anchor, a scan), for `status` to show."""
    lease = replace(Lease.mine(), doing=doing, done=done, of=of)
    stored.set_attr(f"{WORKER}{lease.host}:{lease.pid}", asdict(lease))


def retract_worker(stored: StoredStudy) -> None:
    """Remove what `announce_worker` stored for this process."""
    lease = Lease.mine()
    if (name := f"{WORKER}{lease.host}:{lease.pid}") in stored.attrs:
        stored.set_attr(name, None)


class LeaseMonitor:
    """The other workers' heartbeats as this process has seen them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seen: dict[int, tuple[Any, float]] = {}  # trial number -> its heartbeat, and when it was first seen
        self._looked: float | None = None
        self._lock = threading.Lock()

    def stale(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The running trials whose worker is dead.

        After a long pause between two calls, observation starts again: this process was suspended, or the storage was
        unavailable and no worker could write a heartbeat.
        """
        with self._lock:
            now = self._clock()
            if self._looked is not None and now - self._looked > LEASE_SECONDS / 2:
                self._seen.clear()
            self._looked = now
            self._seen = {t.number: self._first_seen(t, now) for t in running}
            return [t for t in running if self._is_stale(t, now)]

    def _first_seen(self, trial: FrozenTrial, now: float) -> tuple[Any, float]:
        heartbeat = trial.user_attrs.get("lease")
        before = self._seen.get(trial.number)
        return before if before and before[0] == heartbeat else (heartbeat, now)

    def _is_stale(self, trial: FrozenTrial, now: float) -> bool:
        lease = Lease.of_trial(trial)
        return (lease is not None and lease.has_ended()) or now - self._seen[trial.number][1] >= LEASE_SECONDS


def release_stale(stored: StoredStudy, monitor: LeaseMonitor, trials: Sequence[FrozenTrial] | None = None) -> list[str]:
    """End the trials of dead workers, so that other workers evaluate their candidates; returns the candidates' keys.

    `trials`: all trials of the study, if the caller has just read them.
    """
    trials = stored.trials() if trials is None else trials
    running = [t for t in trials if t.state == TrialState.RUNNING and not is_foreign(t)]
    return [t.user_attrs.get("candidate", "") for t in monitor.stale(running) if release(stored, t, "lost")]


def release(stored: StoredStudy, trial: AnyTrial, why: str, reason: str | None = None) -> bool:
    """End a running trial without an outcome, so that another worker can evaluate its candidate.

    `why`: its worker was `lost`, `crashed` or the trial was `handed back`; or it is a `duplicate`. A candidate whose workers
    are lost or crash again and again has failed. Returns False if another process ended the trial first.
    """
    key = (trial if isinstance(trial, FrozenTrial) else stored.trial(trial)).user_attrs.get("candidate")
    ended: list[str | None] = []
    for t in stored.trials() if key else []:
        if t.user_attrs.get("candidate") == key:
            ended = [] if "retry" in t.user_attrs else ended  # attempts before a person's retry do not count
            ended.append(t.user_attrs.get("ended"))
    if why in ATTEMPTS and ended.count(why) + 1 >= ATTEMPTS[why]:
        reason = f"{why} {ATTEMPTS[why]} times" + (f": {reason}" if reason else "")
        why = "failed"
    try:
        stored.set_trial_attr(trial, "ended", why)
        if reason:
            stored.set_trial_attr(trial, "reason", redacted(reason))  # a driver's message may repeat a URL
        stored.end_trial(trial, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


class LeasedTrial:
    """A running trial that this process has a lease on: it writes heartbeats, and notices when the lease is lost."""

    def __init__(self, stored: StoredStudy, trial: Trial, lease: Lease | None = None):
        self.stored, self.trial = stored, trial
        self._lease = lease or Lease.mine()
        self._doing: tuple[str, int, int] = "", 0, 0
        self._lock = threading.Lock()
        self._lost = threading.Event()

    def renew(self) -> None:
        """Write a heartbeat. If another process has ended the trial, the lease is lost: `check` will raise."""
        with self._lock:
            doing, done, of = self._doing
            beat, now = self._lease.beat + 1, round(time.time(), 1)
            self._lease = replace(self._lease, beat=beat, renewed=now, doing=doing, done=done, of=of)
            try:
                self.stored.set_trial_attr(self.trial, "lease", asdict(self._lease))
            except UpdateFinishedTrialError:
                self._lost.set()

    def working_on(self, doing: str, done: int, of: int) -> None:
        """Set the activity that the next heartbeat reports: `done` of `of` units."""
        self._doing = doing, done, of

    def check(self) -> None:
        """Raises LeaseLost if an earlier heartbeat failed for that reason. Does not call the storage."""
        if self._lost.is_set():
            raise LeaseLost

    def confirm(self) -> None:
        """Write a heartbeat. Raises LeaseLost if the lease is lost. Call it before writing anything that other workers read."""
        self.renew()
        self.check()

    def release(self, why: str, reason: str | None = None) -> bool:
        """End the trial without an outcome: see `release`."""
        return release(self.stored, self.trial, why, reason)

    @contextmanager
    def keep_alive(self, duty: Callable[[], object], note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Write heartbeats in the background, and call `duty` as often, in a second thread, since it may be slow.

        An error of `duty` does not end the trial; it is reported to `note`.
        """
        over = threading.Event()
        loops = (self._beat_until, over), (self._repeat_until, over, duty, note)
        threads = [threading.Thread(target=loop, args=arguments, daemon=True) for loop, *arguments in loops]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(timeout=HEARTBEAT_SECONDS)  # they may be waiting for an unavailable storage

    def _beat_until(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            self.renew()

    def _repeat_until(self, over: threading.Event, duty: Callable[[], object], note: Callable[[str], None]) -> None:
        while True:
            try:
                duty()
            except UpdateFinishedTrialError:  # the lease is lost: the next heartbeat will notice
                pass
            except Exception as error:
                note(redacted(f"a background task of the trial failed: {type(error).__name__}: {error}"))
            if over.wait(HEARTBEAT_SECONDS):
                return
