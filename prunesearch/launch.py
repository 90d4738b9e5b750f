"""Run a study: prepare it once, let workers evaluate candidates, then decode the test split for those that count."""

import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import BaseStorage

from prunesearch.candidate import Candidate
from prunesearch.config import StudyConfig, load_study
from prunesearch.mistakes import StudyError
from prunesearch.record import RunRecord, read_records
from prunesearch.scan import Scan, read_scan
from prunesearch.search.leases import BEAT_SECONDS, Held, forget_worker, tell_of_worker
from prunesearch.search.sampler import is_settled
from prunesearch.search.shelf import CHECKPOINT, Shelf, once, open_shelf
from prunesearch.search.space import SearchSpace
from prunesearch.search.storage import open_storage
from prunesearch.search.study import annotate, check_writable, code_identity, join_study, open_study, pin, sampler_of
from prunesearch.search.worker import Referee, work
from prunesearch.speech.corpus import SPLITS, fingerprint, load_corpus
from prunesearch.stopping import Flag, Stop, Stopped, locked


class Watcher(Protocol):
    """Who is told how it goes: a progress display, a log, or nobody."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None: ...

    def finished(self, record: RunRecord, settled: int, of: int) -> None: ...

    def note(self, text: str) -> None: ...


class Nobody:
    """Is told everything and says nothing."""

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        pass

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


MOST_REPLACED = 3  # times the number of workers
_TELLING = threading.Lock()  # a worker's two threads share one pipe


@dataclass
class _Relay:
    """A worker process' watcher: what it is told, the process that started it tells its own. One may stop listening."""

    number: int
    listener: Connection

    def _send(self, *message: Any) -> None:
        with _TELLING, suppress(OSError):  # nobody is there any more; the work goes on
            self.listener.send(message)

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        self._send("progress", what, done, of, self.number)

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        self._send("finished", record, settled, of)

    def note(self, text: str) -> None:
        self._send("note", f"worker {self.number}: {text}")


def launch(
    source: str | Path,
    workers: int = 1,
    trials: int | None = None,
    storage: str | None = None,
    watcher: Watcher | None = None,
    adopt: bool = False,
) -> StudyConfig:
    """Run the study file's study, or go on with it, until `trials` candidates have an outcome, whoever evaluated them.

    One worker is this process; more are processes of their own, which share the processor's threads (or take one GPU
    each). At the end the front and the baselines are decoded on test. `adopt` goes on with other code or data than the study
    began with. Raises StudyError for the user's mistakes, and Stopped after a signal that asks for it.
    """
    config = load_study(source)
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        if workers <= 1:
            worker = _Worker.open(config, storage, watcher, stop, adopt, trials=trials)
            worker.run()
            if worker.workshop.team.leads:
                _test_those_that_count(config, worker.workshop, watcher, stop, storage)
            worker.leave()
        else:
            _run_workers(config, workers, trials, storage, watcher, stop, adopt)
            _test_those_that_count(config, None, watcher, stop, storage)
    return config


def join(source: str | Path, storage: str | None = None, watcher: Watcher | None = None, adopt: bool = False) -> StudyConfig:
    """One more worker for a study that was launched, from anywhere: until the study's budget is used.

    Raises StudyError for the user's mistakes (such as other data than the study's), and Stopped after a signal.
    """
    config = load_study(source)
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        worker = _Worker.open(config, storage, watcher, stop, adopt, creates=False)
        worker.run()
        if worker.workshop.team.leads:
            _test_those_that_count(config, worker.workshop, watcher, stop, storage)
        worker.leave()
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
    watcher = watcher or Nobody()
    stop = Stop()
    with stop.on_signals(watcher.note):
        workshop = _Worker.open(config, storage, watcher, stop, scans=True).workshop
        found = run_scan(workshop, most, utterances, loss_sets, with_wer, check)
    write_scan_report(config.run_folder / "scan", found)
    return found


def create(config: StudyConfig, storage: BaseStorage, trials: int | None = None, scans: bool = False) -> optuna.Study:
    """The study, with a budget that is its own, whoever works on it: `trials`, else the study file's where it has none yet.

    Where nothing is said, it never shrinks. One that was aborted goes on.
    """
    from prunesearch.plan import encoder_layers

    for split in SPLITS:
        load_corpus(config, split)  # a mistake in a manifest is told before anything is created
    space = SearchSpace.of(config, encoder_layers(config))
    study = open_study(config, storage, space)
    if "trials" not in study.user_attrs:
        annotate(study, config, space.named)
    elif scans:  # it says nothing of how far the study is to go
        return study
    budget = max(config.search.trials, study.user_attrs.get("trials", 0)) if trials is None else trials
    study.set_user_attr("trials", budget)
    if study.user_attrs.get("aborted"):
        study.set_user_attr("aborted", False)
    return study


def _open_workshop(config: StudyConfig, watcher: Watcher, check: Callable[[], None]) -> Any:
    from transformers.utils import logging

    from prunesearch.training.workshop import Workshop

    logging.disable_progress_bar()  # the watcher tells of progress
    logging.set_verbosity_error()  # that a decoder's weights are not wanted is no news
    return Workshop.open(config, watcher.progress, check)


class _Worker:
    """A workshop at work on a study; of a team of processes, the leader alone talks to the storage."""

    space: SearchSpace

    def __init__(self, config: StudyConfig, watcher: Watcher, stop: Stop, adopt: bool):
        self.config, self.watcher, self.stop, self.adopt = config, watcher, stop, adopt
        self.held: Held | None = None  # the trial under way
        self.workshop: Any = None  # training.workshop.Workshop: torch is imported only when a worker starts
        self.storage: Any = None  # optuna's; None for those who follow
        self.study: Any = None
        self.shelf: Shelf | None = None  # where workers share no folder
        self._told = 0.0  # when the study was told what this worker does, beside trials

    @classmethod
    def open(
        cls,
        config: StudyConfig,
        url: str | None,
        watcher: Watcher,
        stop: Stop,
        adopt: bool = False,
        creates: bool = True,
        trials: int | None = None,
        scans: bool = False,
    ) -> "_Worker":
        """`creates`: the study, where there is none, with a budget of so many `trials`."""
        worker = cls(config, watcher, stop, adopt)
        if os.environ.get("RANK", "0") == "0":  # a storage that cannot be had is told before models are loaded
            worker.storage = open_storage(url or config.storage.url, config.run_folder, watcher.note, lambda: stop.requested)
            worker.shelf = open_shelf(config)
        worker.workshop = workshop = _open_workshop(config, worker, worker.check)
        corpora = workshop.corpora  # a mistake in a manifest is told before anything is created
        worker.space = SearchSpace.of(config, workshop.depth)
        if workshop.team.leads:
            if worker.shelf and workshop.team.size > 1:
                raise StudyError(["storage.artifacts: not for processes that train together; share the run folder"])
            if creates:
                create(config, worker.storage, trials, scans)
            worker.study = open_study(config, worker.storage, worker.space, create=False)
            check_writable(worker.study)
            pin(worker.study, "code", code_identity(), adopt)
            pin(worker.study, "data", {split: fingerprint(corpora[split]) for split in SPLITS}, adopt)
        return worker

    def leave(self) -> None:
        """Nothing is done for the study any more."""
        if self._told:
            forget_worker(self.study)

    def check(self) -> None:
        """Raises Stopped or Taken: called at every step of whatever the workshop does."""
        self.stop.check()
        if self.held:
            self.held.check()

    def progress(self, what: str, done: int, of: int, worker: int = 0) -> None:
        if self.held:
            self.held.does(what, done, of)
        elif self.study is not None and time.monotonic() - self._told > BEAT_SECONDS:
            self._told = time.monotonic()
            tell_of_worker(self.study, what, done, of)
        self.watcher.progress(what, done, of, worker)

    def finished(self, record: RunRecord, settled: int, of: int) -> None:
        self.watcher.finished(record, settled, of)

    def note(self, text: str) -> None:
        self.watcher.note(text)

    def run(self) -> None:
        """Evaluate candidates until the study's budget is used."""
        from prunesearch.plan import params_of_candidates
        from prunesearch.training.evaluate import evaluate

        config, workshop, team = self.config, self.workshop, self.workshop.team
        if config.training.init == "anchor":
            weights = self._anchor()
            if team.leads:
                pin(self.study, "anchor", {"sha256": _digest(weights)}, self.adopt)

        if not team.leads:
            while (job := team.agree(None)) is not None:
                evaluate(workshop, *job)
            return

        def evaluated(candidate: Candidate, name: str | None, referee: Referee) -> RunRecord:
            team.agree((candidate, name))
            self.held, checkpoint = referee.held, f"records/{candidate.key}/{CHECKPOINT}"
            if self.shelf:
                self.shelf.fetch_records([candidate.key])
                self.shelf.fetch(checkpoint)
            try:
                record = evaluate(workshop, candidate, name, referee.on_rung, referee.make_sure)
                if self.shelf:
                    self.shelf.put_record(candidate.key)
                return record
            except Stopped:
                if self.shelf:
                    self.shelf.put(checkpoint)
                raise
            finally:
                self.held = None

        def keep_checkpoint() -> None:
            if self.shelf and self.held:
                self.held.check()
                self.shelf.put(f"records/{self.held.key}/{CHECKPOINT}")

        count = params_of_candidates(config)

        def params_of(candidate: Candidate) -> float:
            return count(candidate).of(config.search.params_objective)

        self.study.sampler = sampler_of(config, self.space, params_of, self._scan())
        trials = self.study.user_attrs.get("trials", config.search.trials)
        work(
            self.study, self.space, evaluated, params_of, config.search.params_objective, trials, config.run_folder,
            config.training.rung_confidence, self.stop, self.watcher.note, keep_checkpoint,
            on_record=lambda record, settled: self.watcher.finished(record, settled, trials),
            max_worst_group_wer=config.search.max_worst_group_wer,
        )  # fmt: skip
        team.agree(None)  # the others may go home

    def _scan(self) -> Scan | None:
        """What layers are worth, where the study wants to know: measured by one worker, for all."""
        from prunesearch.report.scan import write_scan_report
        from prunesearch.training.scan import scan

        config, path = self.config, "scan/scan.json"
        file = config.run_folder / path  # one that was asked for may know more than the usual one
        guided = config.search.scan and config.search.sampler not in ("random", "grid")

        def measure(make_sure: Callable[[], None] = lambda: None) -> None:
            write_scan_report(file.parent, scan(self.workshop))
            make_sure()
            if self.shelf:
                self.shelf.put(path)

        if guided and config.training.init == "anchor":
            if self.shelf is None:
                if not file.exists():
                    measure()  # a lock in the shared folder sees to it that one does
            else:
                shelf = self.shelf
                once(self.storage, f"{config.name} (scan)", self.stop, lambda: shelf.fetch(path), measure)
        return read_scan(file)

    def _anchor(self) -> Path:
        """The anchor's weights: trained by one worker, for all."""
        if self.shelf is None:  # a lock in the shared folder sees to it
            return Path(self.workshop.anchor())
        shelf, path = self.shelf, "anchor/projector.safetensors"

        def train(make_sure: Callable[[], None]) -> None:
            shelf.fetch(f"anchor/{CHECKPOINT}")
            self.workshop.anchor()
            make_sure()
            shelf.put("anchor/anchor.json")
            shelf.put(path)

        def keep_checkpoint() -> None:
            shelf.put(f"anchor/{CHECKPOINT}")
            if self.study.user_attrs.get("aborted"):
                self.stop.request()

        once(self.storage, f"{self.config.name} (anchor)", self.stop, lambda: shelf.fetch(path), train, keep_checkpoint)
        shelf.fetch("anchor/anchor.json")
        return Path(self.workshop.anchor())


def collect(config: StudyConfig, storage: str | None = None) -> None:
    """Fetch the records that other workers have made, where workers share no run folder."""
    if (shelf := open_shelf(config)) is None:
        return
    study = join_study(config, open_storage(storage or config.storage.url, config.run_folder))
    shelf.fetch_records(t.user_attrs["candidate"] for t in study.get_trials(deepcopy=False) if is_settled(t))


def _digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _work_in_own_process(source: Path, relay: _Relay, workers: int, storage: str | None, flag: Flag, adopt: bool) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(relay.number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    stop = Stop(flag)
    try:
        with stop.on_signals():
            worker = _Worker.open(load_study(source), storage, relay, stop, adopt, creates=False)
            worker.run()
            worker.leave()
    except StudyError as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt):  # the process that started this one says so
        sys.exit(130)


def _run_workers(
    config: StudyConfig, workers: int, trials: int | None, storage: str | None, watcher: Watcher, stop: Stop, adopt: bool
) -> None:
    """Create the study here, then let the processes work, and tell the watcher what they tell."""
    url = storage or config.storage.url
    if url and url.startswith("sqlite"):
        watcher.note("SQLite loses trials when several workers write: the default journal file does not, nor does PostgreSQL")
    create(config, open_storage(url, config.run_folder, watcher.note, lambda: stop.requested), trials)
    context = multiprocessing.get_context("spawn")
    flag = context.RawValue("b", 0)
    shared = Stop(flag)
    processes: list[Any] = []
    listening: dict[Connection, Any] = {}
    replaced = 0

    def start(number: int) -> None:
        here, there = context.Pipe(duplex=False)
        arguments = (config.source, _Relay(number, there), workers, storage, flag, adopt)
        process = context.Process(target=_work_in_own_process, args=arguments, name=f"worker {number}")
        process.start()
        there.close()  # the worker has its own: when it ends, so does the pipe
        processes.append(process)
        listening[here] = process

    with shared.on_signals(watcher.note):
        try:
            for number in range(workers):
                start(number)
            while listening:
                for connection in wait(list(listening)):
                    assert isinstance(connection, Connection)
                    try:
                        call, *told = connection.recv()
                    except (EOFError, OSError, pickle.UnpicklingError):  # it has ended, in the middle of a message perhaps
                        process = listening.pop(connection)
                        process.join()
                        if process.exitcode in (0, 2, 130) or shared.requested:
                            continue
                        watcher.note(f"{process.name} ended ({_ending(process.exitcode)}); its candidate goes to the next")
                        if replaced < MOST_REPLACED * workers:  # a candidate that crashes workers has failed before that
                            replaced += 1
                            start(int(process.name.split()[-1]))
                    else:
                        getattr(watcher, call)(*told)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join()
    stop.check()
    shared.check()
    if any(p.exitcode == 2 for p in processes):
        raise StudyError(["a worker could not go on, for the reason above"])
    if not any(p.exitcode == 0 for p in processes):  # who ends well has seen the study complete
        raise RuntimeError(f"the workers ended ({_ending(processes[-1].exitcode)}); launch again to go on")


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _test_those_that_count(config: StudyConfig, workshop: Any, watcher: Watcher, stop: Stop, storage: str | None) -> None:
    """Decode the test split for the baselines and the front, where that was not done before; one worker does."""
    from prunesearch.report.front import pareto_front, pooled_by_system
    from prunesearch.training.evaluate import decode_test

    collect(config, storage)
    with locked(config.run_folder / "test.lock", stop.check):
        records = read_records(config.run_folder / "records")
        complete = [r for r in records if r.state == "complete"]
        systems = pooled_by_system(complete)
        front = pareto_front(systems, config.search.params_objective, config.search.max_worst_group_wer)
        wanted = {r.candidate for r in (*front, *(s for s in systems if s.name))}
        due = [r for r in complete if r.candidate.system in wanted and r.test is None]
        if not due:
            return
        workshop = workshop or _open_workshop(config, watcher, stop.check)
        shelf = open_shelf(config)
        for done, record in enumerate(due):
            watcher.progress("decoding test", done, len(due))
            decode_test(workshop, record)
            if shelf:
                shelf.put_record(record.candidate.key)
