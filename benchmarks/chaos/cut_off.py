"""Two machines with a database: one of them loses its network for a while during a trial, and gets it back.

    python benchmarks/chaos/cut_off.py [--seconds 45]

Each machine is a network namespace with an address of its own and one worker. PostgreSQL runs outside of both. Neither worker
can tell from a process id whether the other one is alive. Trials are simulated. Needs root, Linux's `ip`, and PostgreSQL's
server.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.storage import STUDY, rules, sampler_of, simulated_record  # noqa: E402
from prunesearch.search.study_progress import StudyProgress  # noqa: E402
from prunesearch.study.progress import NullListener  # noqa: E402
from prunesearch.study.record import RunRecord  # noqa: E402
from prunesearch.workers import lease  # noqa: E402
from prunesearch.workers.loop import run_loop  # noqa: E402
from prunesearch.workers.optuna_internals import StoredStudy  # noqa: E402
from prunesearch.workers.storage import open_storage  # noqa: E402
from prunesearch.workers.trial import WorkerTrial  # noqa: E402
from tests.servers import Postgres, until  # noqa: E402

MACHINES = {"red": ("10.77.1.1", "10.77.1.2"), "blue": ("10.77.2.1", "10.77.2.2")}  # addresses outside and inside
TRIALS, TRIAL_SECONDS = 40, 4.0
HEARTBEAT_SECONDS, LEASE_SECONDS = 1.0, 10.0
FIRST_TRIALS = 4  # before the network is cut
# A cut network sends nothing, so the driver has to find out by itself.
KEEPALIVE = "?keepalives_idle=2&keepalives_interval=1&keepalives_count=3&tcp_user_timeout=5000"


# The machines


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def create_machine(name: str) -> None:
    """A network namespace, connected to this one by a virtual cable."""
    outside, inside = MACHINES[name]
    ip("netns", "add", name)
    ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("addr", "add", f"{outside}/24", "dev", f"to-{name}")
    ip("link", "set", f"to-{name}", "up")
    ip("-n", name, "addr", "add", f"{inside}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")


def start_worker(name: str, server: Postgres, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """This script once more, as a worker on the machine `name`."""
    url = server.url.replace("127.0.0.1", MACHINES[name][0])
    command = ["ip", "netns", "exec", name, sys.executable, __file__, "--worker", name, "--url", url]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)


# A worker


@dataclass(frozen=True)
class Machine(NullListener):
    """Prints what happens on a machine."""

    name: str

    def note(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def evaluate(self, trial: WorkerTrial) -> RunRecord:
        """Simulate a training. Raises LeaseLost."""
        print(f"{self.name} begins {trial.key}", flush=True)
        time.sleep(TRIAL_SECONDS)
        trial.confirm()
        return simulated_record(trial.candidate)


def run_worker(url: str, folder: Path, name: str) -> None:
    """Evaluate candidates on the machine `name` until the study's budget is used."""
    lease.HEARTBEAT_SECONDS, lease.LEASE_SECONDS = HEARTBEAT_SECONDS, LEASE_SECONDS
    lease.pid_namespace = lambda: name  # type: ignore[assignment]
    machine = Machine(name)
    storage = open_storage(url + KEEPALIVE, folder, machine.note)
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler_of("random", 0))
    run_loop(StoredStudy(study, storage), rules(TRIALS), machine.evaluate, listener=machine)
    print(f"{name} is done", flush=True)


# The experiment


def main(seconds: float) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cut."))
    server = Postgres(listen="*")
    log = folder / "log"
    try:
        for name in MACHINES:
            create_machine(name)
        storage = open_storage(server.url, folder)
        study = optuna.create_study(study_name=STUDY, storage=storage, directions=["minimize"] * 2)
        stored = StoredStudy(study, storage)
        workers = [start_worker(name, server, folder, log) for name in MACHINES]
        until(lambda: count_finished(stored) >= FIRST_TRIALS and is_in_a_trial(stored, "blue"), "progress", 120)
        begin = time.monotonic()
        ip("link", "set", "to-blue", "down")
        print(f"blue loses its network when {count_finished(stored)} candidates are finished")
        time.sleep(seconds)
        print(f"blue gets it back after {time.monotonic() - begin:.0f} s, when {count_finished(stored)} are finished")
        ip("link", "set", "to-blue", "up")
        exit_codes = [worker.wait(300) for worker in workers]
        report(stored, log, exit_codes)
    finally:
        for name in MACHINES:
            subprocess.run(["ip", "netns", "del", name], check=False)
        server.remove()


def count_finished(stored: StoredStudy) -> int:
    return StudyProgress.of(stored.trials()).finished


def is_in_a_trial(stored: StoredStudy, machine: str) -> bool:
    """Whether the machine's worker has renewed the lease of a running trial: it has claimed the trial, and evaluates it."""
    held = [lease.Lease.of_trial(t) for t in stored.trials(TrialState.RUNNING)]
    return any(one is not None and one.place == machine and one.beat > 0 for one in held)


def report(stored: StoredStudy, log: Path, exit_codes: list[int]) -> None:
    """Print what the workers said, and what became of the trials."""
    print("".join(line for line in log.read_text().splitlines(keepends=True) if "begins" not in line), end="")
    trials, complete = stored.trials(), stored.trials(TrialState.COMPLETE)
    candidates = Counter(t.user_attrs["candidate"] for t in complete)
    released = Counter(t.user_attrs.get("ended") for t in stored.trials(TrialState.FAIL))
    by_machine = Counter(held.place for t in complete if (held := lease.Lease.of_trial(t)))
    running = sum(not t.state.is_finished() for t in trials)
    print(f"exit codes {exit_codes}; complete {len(complete)}, evaluated twice {sum(n > 1 for n in candidates.values())}")
    print(f"without an outcome {dict(released)}; left running {running}; complete by machine {dict(by_machine)}")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="without network")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        run_worker(a.url, Path.cwd(), a.worker)
    else:
        main(a.seconds)
