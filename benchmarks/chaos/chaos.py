"""Workers killed and held up at random, a database restarted under them, clocks that disagree, a full disk: what is left?

    python benchmarks/chaos/chaos.py [--seed 0] [--workers 8] [--kills 100] [--restarts 10] [--pauses 10]

A study of toy size (real models, seconds a candidate) on a PostgreSQL of its own, its whole space to be evaluated. Half of
the workers behave as if they were on machines of their own; their clocks are up to an hour off. Afterwards the same study is
run in calm by one worker, and everything is compared. Needs PostgreSQL's server, and root for the full disk.
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
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.conftest import save_models, write_split, write_study  # noqa: E402
from tests.servers import Postgres  # noqa: E402

STEPS = 700
FULL_SECONDS = 15
LEASE_SECONDS, PAUSE_SECONDS = 10.0, 14.0  # whoever is held up for so long has lost its trial, and finds that out


def worker(source: Path, url: str, log: Path, skew: float, machine: str | None) -> None:
    """One worker process, with a clock and a machine of its own."""
    import torch

    from prunesearch.commands.worker import join
    from prunesearch.study.interrupt import Interrupted
    from prunesearch.workers import lease as leases

    out = log.open("a", buffering=1)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    leases.HEARTBEAT_SECONDS, leases.LEASE_SECONDS = 1.0, LEASE_SECONDS
    if machine is not None:
        leases.pid_namespace.cache_clear()
        leases.pid_namespace = lambda: machine  # type: ignore[assignment]
    right = time.time
    time.time = lambda: right() + skew  # type: ignore[assignment]

    class Log:
        def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
            pass

        def finished(self, record: Any, finished: int, of: int) -> None:
            print(f"{os.getpid()} {finished}/{of} {record.candidate.key}")

        def note(self, text: str) -> None:
            print(f"{os.getpid()} {text}")

    try:
        join(source, url, Log())
    except Interrupted:
        sys.exit(130)


class Disk:
    """A small disk of its own for the run folder, to be filled."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "prunesearch-chaos", str(folder)]
        self.mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self) -> None:
        with (self.folder / "filling").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                pass

    def clear(self) -> None:
        (self.folder / "filling").unlink()

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def outcomes(source: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Each candidate's record without what differs between any two runs, and its weights."""
    from prunesearch.study.config import load_study
    from prunesearch.study.record import read_records, record_folder

    records = load_study(source).run_folder / "records"
    return {
        r.candidate.key: (
            {**r.outcome(), "study": "", "test": None},
            (record_folder(records, r.candidate) / "weights.safetensors").read_bytes(),
        )
        for r in read_records(records)
    }


def main(seed: int, workers: int, kills: int, restarts: int, pauses: int, interval: float) -> None:
    import optuna

    from prunesearch.commands.launch import launch
    from prunesearch.search.study_progress import StudyProgress
    from prunesearch.study.config import load_study
    from prunesearch.study.front import pareto_front
    from prunesearch.study.record import read_records
    from prunesearch.workers.storage import open_storage

    begin = time.monotonic()
    rng = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="chaos."))
    toy = place / "toy"
    for split, count in (("train", 60), ("dev", 20), ("test", 6)):
        write_split(toy, split, count)
    save_models(toy)
    settings: dict[str, Any] = {
        "training": {"steps": STEPS, "checkpoint_seconds": 0.5},
        "search": {"max_removed": 3, "trials": 1000, "sampler": "random", "fixed": []},
    }
    # the sets of at most three of four layers with each rank, and the baselines' rank
    storm, calm = (write_study(place / name / "s", toy, **settings) for name in ("storm", "calm"))
    disk = Disk(storm.parent / "run")
    server = Postgres()
    config = load_study(storm)
    launch(storm, trials=1, storage=server.url)  # the study, the anchor, and the first baseline
    storage = open_storage(server.url, config.run_folder)
    study = optuna.load_study(study_name=config.name, storage=storage)
    study.set_user_attr("trials", 1000)

    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers", "peft", "prunesearch.commands.launch", "prunesearch.training.context"]
    )
    log = place / "workers.log"
    running: list[BaseProcess] = []

    def start(number: int) -> None:
        machine = f"machine {number}" if number % 2 else None
        process = context.Process(target=worker, args=(storm, server.url, log, rng.uniform(-3600, 3600), machine))
        process.start()
        running.append(process)

    for number in range(workers):
        start(number)
    stale = [storm.parent / "run" / name for name in ("journal.log.lock", "claim.lock", "test.lock", "scan/lock")]
    for lock in stale:
        lock.parent.mkdir(exist_ok=True)
        lock.touch()  # as a machine that is gone leaves them on a network's file system
    restart_at = set(rng.sample(range(1, kills), restarts))
    pause_at = set(rng.sample(range(1, kills), pauses))
    held_up: list[tuple[float, BaseProcess]] = []  # until when, and who

    def release(now: float) -> None:
        for entry in [e for e in held_up if e[0] <= now]:
            held_up.remove(entry)
            if entry[1].is_alive():
                os.kill(entry[1].pid or 0, signal.SIGCONT)

    full_at = kills // 2
    fates: Counter[str] = Counter()
    for kill in range(kills):
        time.sleep(rng.expovariate(1 / interval))
        release(time.monotonic())
        for process in [p for p in running if not p.is_alive()]:
            running.remove(process)
            fates[f"exit code {process.exitcode}"] += 1
            if process.exitcode:
                start(workers + kill)
        victim = rng.choice(running) if running else None
        if victim is not None:
            os.kill(victim.pid or 0, signal.SIGKILL)
            victim.join()
            running.remove(victim)
            fates["kill -9"] += 1
        start(workers + kill)
        free = [p for p in running if p not in (held for _, held in held_up)]
        if kill in pause_at and free:
            slow = rng.choice(free)
            os.kill(slow.pid or 0, signal.SIGSTOP)
            held_up.append((time.monotonic() + PAUSE_SECONDS, slow))
            fates["held up"] += 1
        if kill in restart_at:
            server.stop(rng.choice([signal.SIGINT, signal.SIGQUIT]))
            time.sleep(rng.uniform(0.2, 3))
            server.start()
        if kill == full_at and disk.mounted:
            disk.fill()
            time.sleep(FULL_SECONDS)
            disk.clear()
        print(
            f"\r{kill + 1} kills, {StudyProgress.of(study.get_trials(deepcopy=False)).finished} candidates", end="", flush=True
        )
    print()
    while held_up:
        time.sleep(1)
        release(time.monotonic())
    for process in running:
        process.join()
        fates[f"exit code {process.exitcode}"] += 1
    stormy = time.monotonic() - begin

    trials = study.get_trials(deepcopy=False)
    done = Counter(t.user_attrs["candidate"] for t in trials if t.state == optuna.trial.TrialState.COMPLETE)
    ended = Counter(t.user_attrs.get("ended", "?") for t in trials if t.state == optuna.trial.TrialState.FAIL)
    open_trials = [t.number for t in trials if not t.state.is_finished()]
    torch_threads_alone(calm, len(done))
    ours, theirs = outcomes(storm), outcomes(calm)
    objective = config.search.params_objective
    fronts = [
        [(r.candidate.key, r.parameters.of(objective)) for r in pareto_front(read_records(f), objective)]
        for f in (storm.parent / "run" / "records", calm.parent / "run" / "records")
    ]
    secrets = [
        p for p in place.rglob("*") if p.is_file() and p.name != "postgres" and Postgres.PASSWORD.encode() in p.read_bytes()
    ]
    text = log.read_text()
    print(
        f"seed {seed}: {workers} workers, {kills} kills, {pauses} pauses, {restarts} restarts of the database, {stormy:.0f} s"
    )
    print(f"  workers: {dict(fates)}")
    noticed = {word: text.count(word) for word in ("disk is full", "storage is unavailable", "given to another")}
    print(f"  the disk was full for {FULL_SECONDS if disk.mounted else 0} s; workers said: {noticed}")
    print(f"  trials: {len(trials)}, of these {sum(done.values())} complete; without an outcome: {dict(ended)}")
    print(f"  candidates: {len(done)}, evaluated twice: {sum(n > 1 for n in done.values())}, left running: {len(open_trials)}")
    print(f"  the space, in calm: {len(theirs)} candidates; the same ones: {ours.keys() == theirs.keys()}")
    same = sum(ours[k] == theirs[k] for k in ours.keys() & theirs.keys())
    print(f"  records and weights the same, bit by bit: {same} of {len(theirs)}; fronts the same: {fronts[0] == fronts[1]}")
    print(f"  files with the password: {len(secrets)}")
    server.remove()
    disk.remove()
    fine = same == len(theirs) == len(ours) == sum(done.values()) and not open_trials and fronts[0] == fronts[1] and not secrets
    print("everything is as it should be" if fine else f"NOT as it should be: {place}")
    sys.exit(not fine)


def torch_threads_alone(calm: Path, candidates: int) -> None:
    """The calm run, with as many threads as the workers had: bits depend on them."""
    import torch

    from prunesearch.commands.launch import launch

    torch.set_num_threads(1)
    launch(calm, trials=candidates)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--pauses", type=int, default=10, help="workers that are held up until they are taken for lost")
    parser.add_argument("--interval", type=float, default=2.0, help="mean seconds between two kills")
    main(**vars(parser.parse_args()))
