"""Run a task in one of many workers while the others wait. If that worker dies, another one takes over. On every storage."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from prunesearch.study.interrupt import Interrupt, LeaseLost
from prunesearch.workers.claim import sleep
from prunesearch.workers.lease import LeasedTrial, LeaseMonitor, release_stale
from prunesearch.workers.optuna_internals import StoredStudy

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ExclusiveTask:
    """A task for one worker.

    `done`: whether the task is finished. `act`: do it; its argument is a function to call before `act` writes what others
    read, which raises LeaseLost if another worker has taken over. `duty`: is called every few seconds meanwhile.
    """

    name: str
    done: Callable[[], bool]
    act: Callable[[Callable[[], None]], None]
    duty: Callable[[], object] = lambda: None


def run_exclusively(storage: BaseStorage, task: ExclusiveTask, interrupt: Interrupt) -> None:
    """Return when the task is done, by this worker or another one. Each worker opens a trial in an Optuna study of the task's
    name; the worker with the lowest running trial number acts.

    Raises Interrupted.
    """
    while not task.done():
        with suppress(LeaseLost):
            _take_part(storage, task, interrupt)


def _take_part(storage: BaseStorage, task: ExclusiveTask, interrupt: Interrupt) -> None:
    study = optuna.create_study(study_name=task.name, storage=storage, load_if_exists=True)
    stored, monitor = StoredStudy(study, storage), LeaseMonitor()
    ours = LeasedTrial(stored, study.ask())
    ours.renew()

    def look_around() -> None:
        release_stale(stored, monitor)
        task.duty()

    try:
        with ours.keep_alive(look_around):
            while not task.done():
                interrupt.check()
                ours.check()
                release_stale(stored, monitor)
                if all(ours.trial.number <= t.number for t in stored.trials(TrialState.RUNNING)):
                    task.act(ours.confirm)
                    break
                sleep(POLL_SECONDS, interrupt)
    finally:
        ours.release("handed back")
