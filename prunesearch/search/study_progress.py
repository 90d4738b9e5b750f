"""Where a study stands: what has become of each candidate, and what is due next."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate

GIVEN_BACK = ("lost", "crashed", "handed back")  # by a worker: the candidate has no outcome yet


def is_settled(trial: FrozenTrial) -> bool:
    """Its candidate has an outcome: a result, an early end at a rung, or a failure of its own (not of its worker)."""
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("ended") == "failed"
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class StudyProgress:
    """What a study's trials come to. Read once and looked at often: a study may have ten thousand of them."""

    latest: dict[str, FrozenTrial]  # each candidate's, by its key; withdrawn ones left out
    running: int  # trials
    waiting: int  # trials that somebody has enqueued

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> "StudyProgress":
        found: dict[str, FrozenTrial] = {}
        running = waiting = 0
        for trial in trials:
            state, attrs = trial.state, trial.user_attrs
            running += state == TrialState.RUNNING
            waiting += state == TrialState.WAITING
            key = attrs.get("candidate")
            if not key or (state == TrialState.FAIL and attrs.get("ended") in (None, "duplicate")):
                continue
            if key not in found or found[key].number < trial.number:
                found[key] = trial
        return cls(found, running, waiting)

    @cached_property
    def settled(self) -> int:
        """How many candidates have an outcome (a failure of their own is one), and are not being tried again."""
        return sum(map(is_settled, self.latest.values()))

    @cached_property
    def taken(self) -> set[str]:
        """The candidates that nobody else need evaluate."""
        there = (TrialState.RUNNING, TrialState.WAITING)
        return {key for key, trial in self.latest.items() if trial.state in there or is_settled(trial)}

    @cached_property
    def given_back(self) -> list[str]:
        """The candidates whose workers were lost, or gave them back."""
        return [key for key, t in self.latest.items() if t.state == TrialState.FAIL and t.user_attrs.get("ended") in GIVEN_BACK]

    def due(self, space: SearchSpace) -> Candidate | None:
        """What has to be evaluated before anything is proposed: what was given back, then the named ones."""
        first = (*map(Candidate.from_key, self.given_back), *space.named.values())
        return next((c for c in first if c.key not in self.taken), None)
