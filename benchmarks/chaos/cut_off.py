"""Two machines, as far as the network goes: one is cut off for a while in the middle of a trial, and comes back.

    python benchmarks/chaos/cut_off.py [--seconds 45]

Two network namespaces with addresses of their own, a PostgreSQL server outside, a worker process in each, and process ids that
mean nothing to the other. Trials are simulated. Needs root, Linux's `ip`, and PostgreSQL's server.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.storage import SPACE, params_of, wer_of  # noqa: E402
from prunesearch.search.samplers import CandidateSampler  # noqa: E402
from prunesearch.search.study_progress import StudyProgress  # noqa: E402
from prunesearch.study.progress import NullListener  # noqa: E402
from prunesearch.study.record import Parameters, RunRecord, SplitResult, WordErrors  # noqa: E402
from prunesearch.workers import lease as leases  # noqa: E402
from prunesearch.workers.loop import run_loop  # noqa: E402
from prunesearch.workers.optuna_internals import StoredStudy  # noqa: E402
from prunesearch.workers.storage import open_storage  # noqa: E402
from prunesearch.workers.trial import StudyRules, WorkerTrial  # noqa: E402
from tests.servers import Postgres, until  # noqa: E402

HOSTS = {"red": ("10.77.1.1", "10.77.1.2"), "blue": ("10.77.2.1", "10.77.2.2")}  # this end of the wire, and theirs
TRIALS, TRIAL_SECONDS = 40, 4.0
BEAT, LEASE = 1.0, 10.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def wire(name: str) -> None:
    here, there = HOSTS[name]
    ip("netns", "add", name)
    ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("addr", "add", f"{here}/24", "dev", f"to-{name}")
    ip("link", "set", f"to-{name}", "up")
    ip("-n", name, "addr", "add", f"{there}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")


def labour(url: str, folder: Path, name: str) -> None:
    """A worker on the machine `name`."""
    leases.HEARTBEAT_SECONDS, leases.LEASE_SECONDS = BEAT, LEASE
    leases.pid_namespace = lambda: name  # type: ignore[assignment]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        candidate = trial.candidate
        print(f"{name} begins {candidate.key}", flush=True)
        time.sleep(TRIAL_SECONDS)
        trial.confirm()
        words = WordErrors(substitutions=round(10_000 * wer_of(candidate)), reference_words=10_000)
        size = int(params_of(candidate))
        return RunRecord(
            study="s", encoder_layers=24, removed_layers=candidate.removed_layers, lora_rank=candidate.lora_rank, seed=0,
            state="complete", steps=1, dev=SplitResult(errors=words, utterances=1),
            parameters=Parameters(encoder=size, projector=0, lora=0, llm=0),
        )  # fmt: skip

    class Listener(NullListener):
        def note(self, text: str) -> None:
            print(f"{name}: {text}", flush=True)

    # a cut wire says nothing: the driver has to notice by itself
    options = "?keepalives_idle=2&keepalives_interval=1&keepalives_count=3&tcp_user_timeout=5000"
    listener = Listener()
    storage = open_storage(url + options, folder, listener.note)
    study = optuna.load_study(study_name="s", storage=storage, sampler=CandidateSampler(SPACE, 0))
    rules = StudyRules(SPACE, params_of, "speech_params", TRIALS, 0.95, folder)
    run_loop(StoredStudy(study, storage), rules, evaluate, listener=listener)
    print(f"{name} is done", flush=True)


def main(seconds: float) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cut."))
    server = Postgres(listen="*")
    log = (folder / "log").open("w+")
    try:
        for name in HOSTS:
            wire(name)
        study = optuna.create_study(study_name="s", storage=open_storage(server.url, folder), directions=["minimize"] * 2)
        workers = []
        for name, (here, _) in HOSTS.items():
            url = server.url.replace("127.0.0.1", here)
            command = ["ip", "netns", "exec", name, sys.executable, __file__, "--worker", name, "--url", url]
            workers.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))

        def known() -> int:
            return StudyProgress.of(study.get_trials(deepcopy=False)).finished

        until(lambda: known() >= 4, "progress", 120)
        begin = time.monotonic()
        ip("link", "set", "to-blue", "down")
        print(f"blue is cut off, with {known()} candidates known")
        time.sleep(seconds)
        print(f"blue is back after {time.monotonic() - begin:.0f} s, with {known()} known")
        ip("link", "set", "to-blue", "up")
        codes = [w.wait(300) for w in workers]
        trials = study.get_trials(deepcopy=False)
        complete = Counter(t.user_attrs["candidate"] for t in trials if t.state == optuna.trial.TrialState.COMPLETE)
        ended = Counter(t.user_attrs.get("ended") for t in trials if t.state == optuna.trial.TrialState.FAIL)
        by = Counter(t.user_attrs["lease"]["place"] for t in trials if t.state == optuna.trial.TrialState.COMPLETE)
        log.seek(0)
        print("".join(line for line in log if "begins" not in line), end="")
        print(f"exit codes {codes}; complete {sum(complete.values())}, twice {sum(n > 1 for n in complete.values())}")
        print(f"without an outcome {dict(ended)}; left running {sum(not t.state.is_finished() for t in trials)}; by {dict(by)}")
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)
        server.remove()


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        labour(a.url, Path(os.getcwd()), a.worker)
    else:
        main(a.seconds)
