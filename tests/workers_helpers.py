"""Workers for tests: loops whose evaluation is a formula, in this process or in processes of their own."""

import contextlib
import multiprocessing
import random
import time
from pathlib import Path

from optuna.trial import TrialState

from prunesearch.search.samplers import CandidateSampler
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.progress import NullListener
from prunesearch.study.record import RunRecord
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import open_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import WorkerTrial
from tests.test_search import landscape, rules, space

FORK = multiprocessing.get_context("fork")


class Notes(NullListener):
    """A listener that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def opened(config: StudyConfig, url: str | None, notes: list[str] | None = None) -> StoredStudy:
    storage = open_storage(url, config.run_folder, (notes if notes is not None else []).append)
    return open_study(config, storage, space(), CandidateSampler(space(), 0))


def finished(stored: StoredStudy) -> int:
    return StudyProgress.of(stored.trials()).finished


def complete(stored: StoredStudy) -> list[str]:
    return [t.user_attrs["candidate"] for t in stored.trials(TrialState.COMPLETE)]


def labour(source: Path, url: str | None, trials: int, seconds: float, locked: bool = True) -> None:
    """A worker process: every candidate takes a while, and is written down."""
    config = load_study(source)

    def evaluate(trial: WorkerTrial) -> RunRecord:
        with (source.parent / "evaluated.txt").open("a") as log:
            log.write(trial.key + "\n")
        time.sleep(seconds * random.random())
        return landscape(trial.candidate)

    storage = open_storage(url, config.run_folder, lambda text: None)
    if not locked:
        storage.advisory_lock = lambda study_name: contextlib.nullcontext()
    study = open_study(config, storage, space(), CandidateSampler(space(), 0))
    run_loop(study, rules(config, trials), evaluate)


def started(config: StudyConfig, url: str | None, count: int, *arguments: object) -> list[multiprocessing.process.BaseProcess]:
    processes = [FORK.Process(target=labour, args=(config.source, url, *arguments)) for _ in range(count)]
    for process in processes:
        process.start()
    return list(processes)
