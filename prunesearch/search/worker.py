"""The worker's loop: take a candidate, evaluate it, tell. Any number of workers may run it on one study."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from prunesearch.candidate import BASELINE_NAMES, Candidate
from prunesearch.record import RunRecord, WordErrors
from prunesearch.search.rungs import Finished, chance_of_domination
from prunesearch.search.sampler import SpaceExhausted
from prunesearch.search.space import SearchSpace
from prunesearch.search.study import LEASE_SECONDS, Lease, end_lost, enqueue_next_due, settled

OnRung = Callable[[int, WordErrors], bool]
Evaluate = Callable[[Candidate, str | None, OnRung], RunRecord]
ParamsOf = Callable[[Candidate], float]

POLL_SECONDS = 0.5


def work(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    params_of: ParamsOf,
    objective: str,
    trials: int,
    lock: Path,
    rung_confidence: float,
    on_record: Callable[[int, RunRecord], None] = lambda number, record: None,
) -> None:
    """Evaluate candidates until the study has `trials` settled ones, whoever evaluated them, or none is left.

    `params_of` gives a candidate's value of the second objective before it is trained, for the rungs. `lock` is a file
    shared by the workers: candidates are handed out one at a time, so that no two workers get the same.
    """
    while (trial := _claim(study, space, trials, lock)) is not None:
        candidate = space.candidate(trial.params)
        name = trial.user_attrs.get("name")

        def on_rung(step: int, errors: WordErrors, trial: optuna.Trial = trial, candidate: Candidate = candidate) -> bool:
            params = params_of(candidate)
            trial.set_user_attr(f"rung_{step}", {"wer": errors.wer, "params": params})
            if trial.user_attrs.get("name") in BASELINE_NAMES:
                return False
            return chance_of_domination(errors.wer, params, finished_at(study, step)) >= rung_confidence

        with _renewed_lease(study, trial):
            record = evaluate(candidate, name, on_rung)
        _tell(study, trial, record, objective)
        on_record(trial.number, record)


def _claim(study: optuna.Study, space: SearchSpace, trials: int, lock: Path) -> optuna.Trial | None:
    """The next trial, leased to this process; None when the budget is used up. Waits while others may still fail."""
    exhausted = False
    while True:
        with FileLock(lock):
            end_lost(study)
            done = settled(study)
            if done >= trials:
                return None
            running = len(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
            due = enqueue_next_due(study, space) if done + running < trials else None
            # where the space is used up there is nothing to ask for, but another worker's candidate may still be lost
            if done + running < trials and (due or not exhausted or not running):
                trial = study.ask()
                Lease.mine().write(study, trial._trial_id)
                try:
                    params = {n: trial._suggest(n, d) for n, d in space.distributions.items()}
                except SpaceExhausted:
                    trial.set_user_attr("ended", "space exhausted")
                    study.tell(trial, state=TrialState.FAIL)
                    if not running:
                        return None
                    exhausted = True
                else:
                    trial.set_user_attr("candidate", space.candidate(params).key)
                    return trial
        time.sleep(POLL_SECONDS)


@contextmanager
def _renewed_lease(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Say every now and then that this trial's worker is alive."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE_SECONDS / 4):
            Lease.mine().write(study, trial._trial_id)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def finished_at(study: optuna.Study, step: int) -> list[Finished]:
    """The study's finished trials, and what they were at a rung."""
    return [
        Finished(params=t.values[1], wer=t.values[0], wer_at_rung=t.user_attrs.get(f"rung_{step}", {}).get("wer"))
        for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    ]


def _tell(study: optuna.Study, trial: optuna.Trial, record: RunRecord, objective: str) -> None:
    """A pruned trial has no values in a study of two objectives; a failed one must never be complete.

    Rungs are told once more: a record that was there already has passed them without this trial.
    """
    for rung in record.rungs:
        trial.set_user_attr(f"rung_{rung.step}", {"wer": rung.errors.wer, "params": record.parameters.of(objective)})
    if record.state == "complete":
        assert record.dev is not None
        study.tell(trial, [record.dev.errors.wer, record.parameters.of(objective)])
        return
    trial.set_user_attr("ended", record.state)
    trial.set_user_attr("reason", record.reason)
    study.tell(trial, state=TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL)
