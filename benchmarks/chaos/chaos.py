"""Does a study survive failures? Workers are killed and paused, the database restarts, clocks disagree, the disk is full.

    python benchmarks/chaos/chaos.py [--seed 0] [--workers 8] [--kills 100] [--restarts 10] [--pauses 10]

A study of toy size (real models, seconds per candidate) evaluates its whole space, with a PostgreSQL of its own. Half of the
workers behave as if they were on other machines. Clocks are up to an hour off. Afterwards one worker runs the same study
without failures, and the results are compared. Needs PostgreSQL's server, and root for the full disk.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from prunesearch.search.study_progress import StudyProgress  # noqa: E402
from prunesearch.study.config import StudyConfig, load_study  # noqa: E402
from prunesearch.study.front import pareto_front  # noqa: E402
from prunesearch.study.progress import NullListener  # noqa: E402
from prunesearch.study.record import RunRecord, read_records, record_folder  # noqa: E402
from prunesearch.workers.optuna_internals import StoredStudy  # noqa: E402
from prunesearch.workers.optuna_study import open_existing_study  # noqa: E402
from tests.conftest import save_models, write_split, write_study  # noqa: E402
from tests.servers import Postgres  # noqa: E402

STEPS = 700
# Each set of at most three of four layers with each rank, and the baselines with theirs: fewer than ALL candidates
MAX_REMOVED, ALL = 3, 1000
FULL_SECONDS = 15
HEARTBEAT_SECONDS, LEASE_SECONDS = 1.0, 10.0
PAUSE_SECONDS = 14.0  # longer than a lease: a paused worker loses its trial, and learns that when it continues
MOST_CLOCK_ERROR = 3600.0  # seconds
# Lock files that a machine without power leaves on a network file system
LOCKS = ("journal.log.lock", "claim.lock", "test.lock", "scan/lock")
NOTICED = ("disk is full", "storage is unavailable", "given to another")  # parts of notes that are counted


@dataclass(frozen=True)
class Settings:
    """How many workers and failures. `interval`: mean seconds between two kills."""

    seed: int
    workers: int
    kills: int
    restarts: int
    pauses: int
    interval: float


# Workers


class PrintingListener(NullListener):
    """Prints results and notes with the process id."""

    def finished(self, record: RunRecord, finished: int, total: int, /) -> None:
        print(f"{os.getpid()} {finished}/{total} {record.candidate.key}")

    def note(self, text: str) -> None:
        print(f"{os.getpid()} {text}")


def run_worker(source: Path, url: str, log: Path, clock_error: float, machine: str | None) -> None:
    """One worker process. `clock_error`: seconds. `machine`: its machine's name, if that is not this machine."""
    import torch

    from prunesearch.commands.worker import join
    from prunesearch.study.interrupt import Interrupted
    from prunesearch.workers import lease

    out = log.open("a", buffering=1)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    lease.HEARTBEAT_SECONDS, lease.LEASE_SECONDS = HEARTBEAT_SECONDS, LEASE_SECONDS
    if machine is not None:
        lease.pid_namespace = lambda: machine  # type: ignore[assignment]
    right = time.time
    time.time = lambda: right() + clock_error  # type: ignore[assignment]
    try:
        join(source, url, PrintingListener())
    except Interrupted:
        sys.exit(130)


class Workers:
    """The worker processes of a study: starts, kills and pauses them, and counts in `events` what happens to them."""

    def __init__(self, source: Path, url: str, log: Path, rng: random.Random):
        self._arguments, self._rng = (source, url, log), rng
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "transformers", "peft", "prunesearch.commands.worker", "prunesearch.training.context"]
        )
        self._started = 0
        self._running: list[BaseProcess] = []
        self._paused: list[tuple[float, BaseProcess]] = []  # until when
        self.events: Counter[str] = Counter()

    def start(self) -> None:
        machine = f"machine {self._started}" if self._started % 2 else None
        clock_error = self._rng.uniform(-MOST_CLOCK_ERROR, MOST_CLOCK_ERROR)
        process = self._context.Process(target=run_worker, args=(*self._arguments, clock_error, machine))
        process.start()
        self._started += 1
        self._running.append(process)

    def replace_failed(self) -> None:
        """Start a worker for each one that has ended with an error. A worker that has found no work left is not replaced."""
        for process in [p for p in self._running if not p.is_alive()]:
            self._forget(process)
            if process.exitcode:
                self.start()

    def kill_one(self) -> None:
        """Kill a worker, if there is one, and start another one."""
        if self._running:
            victim = self._rng.choice(self._running)
            victim.kill()
            victim.join()
            self._running.remove(victim)
            self.events["killed"] += 1
        self.start()

    def pause_one(self) -> None:
        paused = [process for _, process in self._paused]
        if free := [p for p in self._running if p not in paused]:
            process = self._rng.choice(free)
            _signal(process, signal.SIGSTOP)
            self._paused.append((time.monotonic() + PAUSE_SECONDS, process))
            self.events["paused"] += 1

    def resume(self) -> None:
        """Resume the workers whose pause is over."""
        now = time.monotonic()
        for until, process in [pause for pause in self._paused if pause[0] <= now]:
            self._paused.remove((until, process))
            if process.is_alive():
                _signal(process, signal.SIGCONT)

    def wait(self) -> None:
        """Wait until all workers have ended."""
        while self._paused:
            time.sleep(1)
            self.resume()
        for process in list(self._running):
            process.join()
            self._forget(process)

    def _forget(self, process: BaseProcess) -> None:
        self._running.remove(process)
        self.events[f"exit code {process.exitcode}"] += 1


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


# Failures


class Disk:
    """A small file system of its own for the run folder, which can be filled. Without root, there is none."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "prunesearch-chaos", str(folder)]
        self.mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def be_full(self, seconds: float) -> None:
        if not self.mounted:
            return
        filling = self._folder / "filling"
        with filling.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                pass
        time.sleep(seconds)
        filling.unlink()

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self._folder)], check=True)


def restart(server: Postgres, rng: random.Random) -> None:
    """Stop the database, in order or as if its machine had lost power, and start it after up to three seconds."""
    server.stop(rng.choice([signal.SIGINT, signal.SIGQUIT]))
    time.sleep(rng.uniform(0.2, 3))
    server.start()


def run_with_failures(
    settings: Settings, stored: StoredStudy, workers: Workers, server: Postgres, disk: Disk, rng: random.Random
) -> None:
    """Start the workers, let the failures happen, and wait until the workers have evaluated all candidates."""
    for _ in range(settings.workers):
        workers.start()
    restarts = set(rng.sample(range(1, settings.kills), settings.restarts))
    pauses = set(rng.sample(range(1, settings.kills), settings.pauses))
    for kill in range(settings.kills):
        time.sleep(rng.expovariate(1 / settings.interval))
        workers.resume()
        workers.replace_failed()
        workers.kill_one()
        if kill in pauses:
            workers.pause_one()
        if kill in restarts:
            restart(server, rng)
        if kill == settings.kills // 2:
            disk.be_full(FULL_SECONDS)
        print(f"\r{kill + 1} kills, {StudyProgress.of(stored.trials()).finished} candidates", end="", flush=True)
    print()
    workers.wait()


# Results


@dataclass(frozen=True)
class Trials:
    """What became of a study's trials. `complete`: their number by candidate; `released`: by reason; `running`: left open."""

    total: int
    complete: Counter[str]
    released: Counter[str]
    running: int

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> "Trials":
        complete = Counter(t.user_attrs["candidate"] for t in trials if t.state == TrialState.COMPLETE)
        released = Counter(t.user_attrs.get("ended", "?") for t in trials if t.state == TrialState.FAIL)
        return cls(len(trials), complete, released, sum(not t.state.is_finished() for t in trials))


@dataclass(frozen=True)
class Results:
    """A study's front, and each candidate's outcome: its record without what differs between any two runs, and its weights."""

    outcomes: dict[str, tuple[dict[str, Any], bytes]]
    front: list[tuple[str, int]]  # keys and parameters

    @classmethod
    def of(cls, config: StudyConfig) -> "Results":
        folder, objective = config.run_folder / "records", config.search.params_objective
        records = read_records(folder)
        outcomes = {
            r.candidate.key: (
                {**r.outcome(), "study": "", "test": None},
                (record_folder(folder, r.candidate) / "weights.safetensors").read_bytes(),
            )
            for r in records
        }
        return cls(outcomes, [(r.candidate.key, r.parameters.of(objective)) for r in pareto_front(records, objective)])


def files_with_password(folder: Path) -> list[Path]:
    secret = Postgres.PASSWORD.encode()
    return [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


def report(trials: Trials, found: Results, expected: Results, secrets: list[Path]) -> bool:
    """Print the comparison; whether all is right."""
    complete = sum(trials.complete.values())
    twice = sum(n > 1 for n in trials.complete.values())
    count, same_keys = len(expected.outcomes), found.outcomes.keys() == expected.outcomes.keys()
    same = sum(found.outcomes.get(key) == outcome for key, outcome in expected.outcomes.items())
    same_fronts = found.front == expected.front
    print(f"  trials: {trials.total}, of these {complete} complete; without an outcome: {dict(trials.released)}")
    print(f"  candidates: {len(trials.complete)}, evaluated twice: {twice}, left running: {trials.running}")
    print(f"  without failures: {count} candidates; the same ones: {same_keys}")
    print(f"  records and weights that are bit-identical: {same} of {count}; same fronts: {same_fronts}")
    print(f"  files with the password: {len(secrets)}")
    return same == count == len(found.outcomes) == complete and not trials.running and same_fronts and not secrets


# The experiment


def write_studies(place: Path) -> tuple[Path, Path]:
    """Two study files that differ in their folder only."""
    toy = place / "toy"
    for split, count in (("train", 60), ("dev", 20), ("test", 6)):
        write_split(toy, split, count)
    save_models(toy)
    sections: dict[str, Any] = {
        "training": {"steps": STEPS, "checkpoint_seconds": 0.5},
        "search": {"max_removed": MAX_REMOVED, "trials": ALL, "sampler": "random", "fixed": []},
    }
    with_failures, without = (write_study(place / name / "s", toy, **sections) for name in ("storm", "calm"))
    return with_failures, without


def run_without_failures(source: Path, candidates: int) -> None:
    """One worker, with as many threads as the others had: the results' bits depend on that number."""
    import torch

    from prunesearch.commands.launch import launch

    torch.set_num_threads(1)
    launch(source, trials=candidates)


def main(settings: Settings) -> bool:
    from prunesearch.commands.launch import launch

    begin, rng = time.monotonic(), random.Random(settings.seed)
    place = Path(tempfile.mkdtemp(prefix="chaos."))
    with_failures, without = write_studies(place)
    config, log = load_study(with_failures), place / "workers.log"
    disk, server = Disk(config.run_folder), Postgres()
    try:
        launch(with_failures, trials=1, storage=server.url)  # the study, the anchor, and the first baseline
        stored = open_existing_study(config, server.url)
        stored.set_attr("trials", ALL)
        for lock in (config.run_folder / name for name in LOCKS):
            lock.parent.mkdir(exist_ok=True)
            lock.touch()
        workers = Workers(with_failures, server.url, log, rng)
        run_with_failures(settings, stored, workers, server, disk, rng)
        seconds, trials = time.monotonic() - begin, Trials.of(stored.trials())
        run_without_failures(without, len(trials.complete))

        failures = f"{settings.kills} kills, {settings.pauses} pauses, {settings.restarts} restarts of the database"
        print(f"seed {settings.seed}: {settings.workers} workers, {failures}, {seconds:.0f} s")
        print(f"  workers: {dict(workers.events)}")
        notes = {part: log.read_text().count(part) for part in NOTICED}
        print(f"  the disk was full for {FULL_SECONDS if disk.mounted else 0} s; notes of workers: {notes}")
        right = report(trials, Results.of(config), Results.of(load_study(without)), files_with_password(place))
    finally:
        server.remove()
        disk.remove()
    print("everything is right" if right else f"NOT everything is right: {place}")
    return right


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=10, help="of the database")
    parser.add_argument("--pauses", type=int, default=10, help="workers that are paused for longer than a lease")
    parser.add_argument("--interval", type=float, default=2.0, help="mean seconds between two kills")
    sys.exit(not main(Settings(**vars(parser.parse_args()))))
