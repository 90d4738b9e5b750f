"""The trial that a worker has: one object from the claim to the outcome."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from prunesearch.search.rungs import Finished, chance_of_domination
from prunesearch.search.samplers import WORST_GROUP_WER
from prunesearch.search.space import ParamsOf, SearchSpace
from prunesearch.search.study_progress import candidate_key
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.record import RunRecord, WordErrors
from prunesearch.workers.lease import Lease, LeasedTrial
from prunesearch.workers.optuna_internals import StoredStudy


@dataclass(frozen=True)
class StudyRules:
    """What a study's workers have in common: which candidates there are, how many to evaluate, and what counts as better.

    `params_of`: a candidate's value of `objective`, known before it is trained. `trials`: candidates to evaluate, where the
    stored study has no number of its own. `rung_confidence`: how likely a trial must be to end dominated for a rung to end it.
    """

    space: SearchSpace
    params_of: ParamsOf
    objective: str
    trials: int
    rung_confidence: float
    max_worst_group_wer: float | None = None

    def name_of(self, candidate: Candidate) -> str | None:
        """The name of a baseline; None for any other candidate."""
        return next((n for n in BASELINE_NAMES if self.space.named.get(n) == candidate), None)


class WorkerTrial(LeasedTrial):
    """The candidate that this worker evaluates, the Optuna trial that stands for it, and the lease on that trial.

    `unwritten`: whether the storage has not been told the trial's parameters yet.
    """

    def __init__(
        self,
        stored: StoredStudy,
        rules: StudyRules,
        trial: optuna.Trial,
        candidate: Candidate,
        lease: Lease | None = None,
        unwritten: bool = False,
    ):
        super().__init__(stored, trial, lease)
        self.rules, self.candidate = rules, candidate
        self.name = rules.name_of(candidate)
        self.unwritten = unwritten
        self._pending = rules.space.params(candidate) if unwritten else {}
        self._writing = threading.Lock()

    @property
    def key(self) -> str:
        return self.candidate.key

    @property
    def number(self) -> int:
        return self.trial.number

    def write_params(self) -> None:
        """Store the parameters: about ten milliseconds for each layer in a database, so not under the claim's lock."""
        distributions = self.rules.space.distributions
        with self._writing:
            while self._pending:
                name, value = next(iter(self._pending.items()))
                self.stored.set_trial_param(self.trial, name, value, distributions[name])
                del self._pending[name]

    @contextmanager
    def keep_lease(self, duty: Callable[[], object], note: Callable[[str], None]) -> Iterator[None]:
        """Keep the lease while the candidate is evaluated; parameters are written meanwhile, in the background.

        `duty`: see `keep_alive`.
        """

        def first_params_then_duty() -> None:
            if self._pending:
                self.write_params()
            else:
                duty()

        with self.keep_alive(first_params_then_duty, note):
            yield
        self.write_params()  # in case the evaluation was quicker

    def ends_at_rung(self, step: int, errors: WordErrors) -> bool:
        """Store the dev errors after `step` steps. Whether to end the trial: it is all but sure to end dominated.

        A baseline is never ended. Raises LeaseLost.
        """
        self.confirm()
        params = self.rules.params_of(self.candidate)
        self.trial.set_user_attr(f"rung_{step}", {"wer": errors.wer, "params": params})
        if self.name is not None:
            return False
        return chance_of_domination(errors.wer, params, finished_at(self.stored, step)) >= self.rules.rung_confidence

    def tell(self, record: RunRecord) -> None:
        """Store the outcome. Raises UpdateFinishedTrialError if another process has ended the trial: the first outcome counts.

        Rungs are stored again: the record may come from an earlier trial of the same candidate. A pruned trial has no values in
        a study of two objectives.
        """
        for rung in record.rungs:
            told = {"wer": rung.errors.wer, "params": record.parameters.of(self.rules.objective)}
            self.stored.set_trial_attr(self.trial, f"rung_{rung.step}", told)
        if record.state == "complete":
            assert record.dev is not None
            limit, worst = self.rules.max_worst_group_wer, record.dev.worst_group_wer
            if limit is not None and worst is not None:
                self.trial.set_user_attr(WORST_GROUP_WER, worst)
                self.trial.set_constraint(WORST_GROUP_WER, worst - limit)
            values = [record.dev.errors.wer, float(record.parameters.of(self.rules.objective))]
            self.stored.end_trial(self.trial, TrialState.COMPLETE, values)
            return
        self.stored.set_trial_attr(self.trial, "ended", record.state)
        self.stored.set_trial_attr(self.trial, "reason", record.reason)
        self.stored.end_trial(self.trial, TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL)

    def hand_back(self, reason: str | None = None) -> None:
        """Release the candidate for another worker, because this one stops."""
        self._release_with_params("handed back", reason)

    def crash(self, reason: str) -> None:
        """Release the candidate for another worker, because its evaluation raised an exception here."""
        self._release_with_params("crashed", reason)

    def _release_with_params(self, why: str, reason: str | None) -> None:
        with suppress(UpdateFinishedTrialError, ValueError):
            self.write_params()
        self.release(why, reason)


def finished_at(stored: StoredStudy, step: int) -> list[Finished]:
    """The study's complete trials, with their dev WER at a rung where it was measured."""
    return [
        Finished(params=t.values[1], wer=t.values[0], wer_at_rung=t.user_attrs.get(f"rung_{step}", {}).get("wer"))
        for t in stored.trials(TrialState.COMPLETE)
        if candidate_key(t)
    ]
