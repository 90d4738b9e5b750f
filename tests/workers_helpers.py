"""Workers for tests: loops whose evaluation is a formula, in this process or in processes of their own."""

import contextlib
import io
import multiprocessing
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import TrialState

from prunesearch.cli.app import main
from prunesearch.search.samplers import CandidateSampler
from prunesearch.search.study_progress import StudyProgress, candidate_key
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
    """The keys of the candidates that are complete, one for each trial."""
    return [key for t in stored.trials(TrialState.COMPLETE) if (key := candidate_key(t))]


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


@dataclass(frozen=True)
class Done:
    """What a command wrote, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of a user's mistakes: what stderr holds besides the progress, which begins with the time."""
        assert self.code == 2, self
        return [line for line in self.err.splitlines() if not re.match(r" *\d+:\d\d ", line)]

    @property
    def error(self) -> str:
        """The line, if there is only one."""
        (line,) = self.errors
        return line


def command(*arguments: object) -> Done:
    """A command line, run in this process: that is quicker than a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["prunesearch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())
