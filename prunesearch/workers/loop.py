"""The worker's loop: take a candidate, evaluate it, tell. Any number of workers may run it on one study."""

import errno
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from prunesearch.search.rungs import Finished, chance_of_domination
from prunesearch.search.samplers import WORST_GROUP_WER
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.interrupt import Interrupt, Interrupted, LeaseLost
from prunesearch.study.record import RunRecord, WordErrors
from prunesearch.workers.artifacts import ArtifactStoreUnavailable
from prunesearch.workers.claim import Claim, claim, sleep
from prunesearch.workers.lease import LeaseHolder, LeaseMonitor, end_lost, give_up, kept

ParamsOf = Callable[[Candidate], float]
OnRecord = Callable[[RunRecord, int], None]

FULL_DISK_SECONDS = 30.0


class Evaluate(Protocol):
    """Trains a candidate and scores it. Asks `referee` at rungs, and before it writes what others read."""

    def __call__(self, candidate: Candidate, name: str | None, referee: "TrialMonitor") -> RunRecord: ...


class TrialMonitor:
    """Tells whoever evaluates a trial whether to go on with it."""

    def __init__(self, study: optuna.Study, claimed: Claim, params: float, confidence: float):
        self._study, self._claim, self._params, self._confidence = study, claimed, params, confidence
        self.held: LeaseHolder = claimed.held

    def on_rung(self, step: int, errors: WordErrors) -> bool:
        """Whether to end the trial here: it is all but sure to come out dominated. A baseline never is ended."""
        self.held.make_sure()
        self._claim.trial.set_user_attr(f"rung_{step}", {"wer": errors.wer, "params": self._params})
        if self._claim.name in BASELINE_NAMES:
            return False
        return chance_of_domination(errors.wer, self._params, finished_at(self._study, step)) >= self._confidence

    def make_sure(self) -> None:
        """Raises LeaseLost where another worker has the trial by now."""
        self.held.make_sure()


def work(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    params_of: ParamsOf,
    objective: str,
    trials: int,
    run_folder: Path,
    rung_confidence: float,
    stop: Interrupt | None = None,
    note: Callable[[str], None] = print,
    on_beat: Callable[[], None] = lambda: None,
    on_record: OnRecord = lambda record, settled: None,
    max_worst_group_wer: float | None = None,
) -> None:
    """Evaluate candidates until the study has `trials` of them with an outcome, whoever evaluated them, or none is left.

    `params_of` gives a candidate's value of the second objective before it is trained, for the rungs. Asked to stop, it hands
    the candidate back and raises Interrupted. `on_beat` is called every few seconds while a candidate is evaluated.
    """
    stop = stop or Interrupt()
    watch = LeaseMonitor()
    study.get_trials(deepcopy=False)  # the first look at a large study takes long: nobody should have to wait for it

    def look() -> None:
        end_lost(study, watch)
        on_beat()
        if study.user_attrs.get("aborted"):
            stop.request()

    while (claimed := claim(study, space, trials, watch, stop, run_folder)) is not None:
        referee = TrialMonitor(study, claimed, params_of(claimed.candidate), rung_confidence)

        def back(why: str, reason: str | None = None, claimed: Claim = claimed) -> None:
            with suppress(UpdateFinishedTrialError, ValueError):
                claimed.write_params(study._storage)
            give_up(study, study._storage.get_trial(claimed.trial._trial_id), why, reason)

        try:
            with kept(claimed.held, look, partial(claimed.write_params, study._storage), note):
                record = evaluate(claimed.candidate, claimed.name, referee)
            claimed.write_params(study._storage)  # where the trial was over sooner
            _tell(study, claimed.trial, record, objective, max_worst_group_wer)
        except (LeaseLost, UpdateFinishedTrialError):
            note(f"{claimed.candidate.key} was given to another worker in the meantime")
        except (Interrupted, KeyboardInterrupt):
            back("handed back")
            raise
        except OSError as error:
            back("handed back" if _is_passing(error) else "crashed", str(error))
            if not _is_passing(error):
                raise
            what = "the disk is full" if _is_full(error) else "files cannot be had"
            note(f"{what} ({error.filename or error.strerror}); trying again in {FULL_DISK_SECONDS:.0f} s")
            sleep(FULL_DISK_SECONDS, stop)
        except Exception:
            back("crashed", traceback.format_exc(limit=-1).strip().splitlines()[-1])
            raise
        else:
            on_record(record, StudyProgress.of(study.get_trials(deepcopy=False)).settled)


def _is_passing(error: OSError) -> bool:
    """Whether it has nothing to do with the candidate."""
    return _is_full(error) or isinstance(error, ArtifactStoreUnavailable)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def finished_at(study: optuna.Study, step: int) -> list[Finished]:
    """The study's finished trials, and what they were at a rung."""
    return [
        Finished(params=t.values[1], wer=t.values[0], wer_at_rung=t.user_attrs.get(f"rung_{step}", {}).get("wer"))
        for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    ]


def _tell(
    study: optuna.Study, trial: optuna.Trial, record: RunRecord, objective: str, max_worst_group_wer: float | None
) -> None:
    """A pruned trial has no values in a study of two objectives; a failed one must never be complete.

    Rungs are told once more: a record that was there already has passed them without this trial. Raises
    UpdateFinishedTrialError where somebody else has ended the trial: of several outcomes, the first one counts.
    """
    storage, number = study._storage, trial._trial_id
    for rung in record.rungs:
        told = {"wer": rung.errors.wer, "params": record.parameters.of(objective)}
        storage.set_trial_user_attr(number, f"rung_{rung.step}", told)
    if record.state == "complete":
        assert record.dev is not None
        if max_worst_group_wer is not None and (worst := record.dev.worst_group_wer) is not None:
            trial.set_user_attr(WORST_GROUP_WER, worst)
            trial.set_constraint(WORST_GROUP_WER, worst - max_worst_group_wer)
        values = [record.dev.errors.wer, float(record.parameters.of(objective))]
        storage.set_trial_state_values(number, TrialState.COMPLETE, values)
        return
    storage.set_trial_user_attr(number, "ended", record.state)
    storage.set_trial_user_attr(number, "reason", record.reason)
    storage.set_trial_state_values(number, TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL)
