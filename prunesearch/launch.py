"""Run a study: prepare it once, let workers evaluate candidates, then decode the test split for those that count."""

import json
import multiprocessing
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import TrialState

from prunesearch.candidate import Candidate
from prunesearch.config import StudyConfig, load_study
from prunesearch.mistakes import StudyError
from prunesearch.record import RunRecord, read_records
from prunesearch.scan import Scan, read_scan
from prunesearch.search.space import SearchSpace
from prunesearch.search.storage import open_storage
from prunesearch.search.study import open_study, sampler_of, settled
from prunesearch.search.worker import OnRung, work
from prunesearch.speech.corpus import SPLITS, load_corpus


class Watcher(Protocol):
    """Who is told how it goes: a progress display, a log, or nobody."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None: ...

    def finished(self, record: RunRecord, settled: int, of: int) -> None: ...


class Nobody:
    """Is told everything and says nothing."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        pass

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        pass


@dataclass
class _Relay:
    """A worker process' watcher: what it is told, the process that started it tells its own. One may stop listening."""

    number: int
    listener: Connection

    def _send(self, *message: Any) -> None:
        with suppress(OSError):  # nobody is there any more; the work goes on
            self.listener.send(message)

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        self._send("progress", what, done, of, self.number)

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        self._send("finished", record, settled, of)


def launch(
    source: str | Path,
    workers: int = 1,
    trials: int | None = None,
    storage: str | None = None,
    watcher: Watcher | None = None,
) -> StudyConfig:
    """Run the study file's study, or go on with it, until `trials` candidates have an outcome.

    One worker is this process; more are processes of their own, which share the processor's threads (or take one GPU
    each). At the end the front and the baselines are decoded on test. Raises StudyError for the user's mistakes.
    """
    config = load_study(source)
    watcher = watcher or Nobody()
    trials = trials or config.search.trials
    workshop = None
    if workers <= 1:
        worker = _Worker.open(config, storage, watcher)
        worker.run(trials)
        workshop = worker.workshop
        if not workshop.team.leads:
            return config
    else:
        _run_workers(config, workers, trials, storage, watcher)
    _test_those_that_count(config, workshop, watcher)
    return config


def scan(
    source: str | Path,
    most: int = 2,
    utterances: int = 64,
    loss_sets: int = 128,
    with_wer: bool = False,
    check: bool = False,
    storage: str | None = None,
    watcher: Watcher | None = None,
) -> Scan:
    """Measure what the study's layers are worth before any training, and write the scan and its report to `run/scan/`.

    The anchor is trained if it is not there yet. See `training.scan.scan` for the settings. Raises StudyError for the
    user's mistakes.
    """
    from prunesearch.report.scan import write_scan_report
    from prunesearch.training.scan import scan as run_scan

    config = load_study(source)
    workshop = _Worker.open(config, storage, watcher or Nobody()).workshop
    found = run_scan(workshop, most, utterances, loss_sets, with_wer, check)
    write_scan_report(config.run_folder / "scan", found)
    return found


def _open_workshop(config: StudyConfig, watcher: Watcher) -> Any:
    from transformers.utils import logging

    from prunesearch.training.workshop import Workshop

    logging.disable_progress_bar()  # the watcher tells of progress
    logging.set_verbosity_error()  # that a decoder's weights are not wanted is no news
    return Workshop.open(config, watcher.progress)


@dataclass
class _Worker:
    """A workshop at work on a study; of a team of processes, the leader alone talks to the storage."""

    workshop: Any  # training.workshop.Workshop: torch is imported only when a worker starts
    storage: Any  # optuna's; None for those who follow
    space: SearchSpace
    watcher: Watcher

    @classmethod
    def open(cls, config: StudyConfig, url: str | None, watcher: Watcher) -> "_Worker":
        workshop = _open_workshop(config, watcher)
        _ = workshop.corpora  # a mistake in a manifest is told before anything is created
        space = SearchSpace.of(config, workshop.depth)
        storage = None
        if workshop.team.leads:
            storage = open_storage(url or config.storage.url, config.run_folder)
            open_study(config, storage, space)  # and one in the study file, too
        return cls(workshop, storage, space, watcher)

    def run(self, trials: int) -> None:
        from prunesearch.plan import params_of_candidates
        from prunesearch.report.scan import write_scan_report
        from prunesearch.training.evaluate import evaluate
        from prunesearch.training.scan import scan

        config, workshop, team = self.workshop.config, self.workshop, self.workshop.team
        if config.training.init == "anchor":
            workshop.anchor()

        if not team.leads:
            while (job := team.agree(None)) is not None:
                evaluate(workshop, *job)
            return

        def evaluated(candidate: Candidate, name: str | None, on_rung: OnRung) -> RunRecord:
            team.agree((candidate, name))
            return evaluate(workshop, candidate, name, on_rung)

        count = params_of_candidates(config)

        def params_of(candidate: Candidate) -> float:
            return count(candidate).of(config.search.params_objective)

        found = read_scan(config.run_folder / "scan" / "scan.json")  # one that was asked for may know more than the usual one
        guided = config.search.scan and config.search.sampler not in ("random", "grid")
        if guided and found is None and config.training.init == "anchor":
            found = scan(workshop)
            write_scan_report(config.run_folder / "scan", found)
        study = open_study(config, self.storage, self.space, sampler_of(config, self.space, params_of, found))
        work(
            study, self.space, evaluated, params_of, config.search.params_objective, trials,
            config.run_folder / "claim.lock", config.training.rung_confidence,
            on_record=lambda number, record: self.watcher.finished(record, settled(study), trials),
        )  # fmt: skip
        team.agree(None)  # the others may go home


def _work_in_own_process(source: Path, relay: _Relay, workers: int, trials: int, storage: str | None) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(relay.number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        _Worker.open(load_study(source), storage, relay).run(trials)
    except StudyError as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # the process that started this one says so
        sys.exit(130)


def _run_workers(config: StudyConfig, workers: int, trials: int, storage: str | None, watcher: Watcher) -> None:
    """Create the study here, then let the processes work, and tell the watcher what they tell."""
    from prunesearch.plan import encoder_layers

    for split in SPLITS:
        load_corpus(config, split)  # a mistake in a manifest is told once, before anything is created
    space = SearchSpace.of(config, encoder_layers(config))
    open_study(config, open_storage(storage or config.storage.url, config.run_folder), space)
    context = multiprocessing.get_context("spawn")
    processes, listening = [], []
    try:
        for number in range(workers):
            here, there = context.Pipe(duplex=False)
            relay = _Relay(number, there)
            process = context.Process(target=_work_in_own_process, args=(config.source, relay, workers, trials, storage))
            process.start()
            there.close()  # the worker has its own: when it ends, so does the pipe
            processes.append(process)
            listening.append(here)
        while listening:
            for connection in wait(listening):
                assert isinstance(connection, Connection)
                try:
                    call, *told = connection.recv()
                except (EOFError, OSError):  # the worker has ended, in the middle of a message perhaps
                    listening.remove(connection)
                else:
                    getattr(watcher, call)(*told)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
    if any(p.exitcode == 2 for p in processes):
        raise StudyError(["the workers could not start, for the reasons above"])
    if failed := [p for p in processes if p.exitcode]:
        raise RuntimeError(
            f"{len(failed)} of {workers} workers ended with exit code {failed[0].exitcode}; launch again to go on"
        )


def _test_those_that_count(config: StudyConfig, workshop: Any, watcher: Watcher) -> None:
    """Decode the test split for the baselines and the front, where that was not done before."""
    from prunesearch.report.front import pareto_front, pooled_by_system
    from prunesearch.training.evaluate import decode_test

    records = read_records(config.run_folder / "records")
    complete = [r for r in records if r.state == "complete"]
    systems = pooled_by_system(complete)
    front = pareto_front(systems, config.search.params_objective)
    wanted = {r.candidate for r in (*front, *(s for s in systems if s.name))}
    due = [r for r in complete if r.candidate.system in wanted and r.test is None]
    if not due:
        return
    workshop = workshop or _open_workshop(config, watcher)
    for done, record in enumerate(due):
        watcher.progress("decoding test", done, len(due))
        decode_test(workshop, record)


def left_out(config: StudyConfig) -> dict[str, int]:
    """How many lines of each split's sources the study does without, where there are any."""
    files = {split: config.run_folder / "corpus" / f"{split}.json" for split in SPLITS}
    counts = {split: len(json.loads(f.read_text(encoding="utf-8"))["dropped"]) for split, f in files.items() if f.exists()}
    return {split: count for split, count in counts.items() if count}


def status(source: str | Path, storage: str | None = None) -> dict[str, Any]:
    """How far a study has come: trials by state, who is working on what, and the best so far. Reads only."""
    config = load_study(source, data_must_exist=False)
    if storage is None and config.storage.url is None and not (config.run_folder / "journal.log").exists():
        raise StudyError([f"{config.name} has not been launched yet: `prunesearch launch {config.source}`"])
    import optuna

    from prunesearch.search.study import Lease

    try:
        study = optuna.load_study(
            study_name=config.name, storage=open_storage(storage or config.storage.url, config.run_folder)
        )
    except KeyError:
        raise StudyError([f"the storage holds no study named {config.name}"]) from None
    trials = study.get_trials(deepcopy=False)
    counts = {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
    running = [
        {
            "trial": t.number,
            "candidate": t.user_attrs.get("candidate"),
            "pid": lease.pid,
            "host": lease.host,
            "alive": lease.is_held(),
        }
        for t in trials
        if t.state == TrialState.RUNNING and (lease := Lease.of(t))
    ]
    best = [
        {"candidate": t.user_attrs.get("candidate"), "dev_wer": t.values[0], config.search.params_objective: t.values[1]}
        for t in sorted(study.best_trials, key=lambda t: t.values[1])
    ]
    return {
        "study": config.name,
        "settled": settled(study),
        "trials": config.search.trials,
        "states": counts,
        "running": running,
        "front": best,
    }
