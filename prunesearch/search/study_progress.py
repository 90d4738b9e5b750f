"""How far a study has come: the latest trial of each candidate, and which candidates are pending."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.space import REMOVE, SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError

RELEASED = ("lost", "crashed", "handed back")  # values of a trial's attribute `ended`: the candidate has no outcome yet


@cache
def _checked_key(key: str) -> str:
    """The same key. Raises ValueError for a text that is no candidate's key: a key becomes the name of a folder."""
    return Candidate.from_key(key).key


def candidate_key(trial: FrozenTrial) -> str | None:
    """The key of a trial's candidate; None for a trial that has no candidate yet, or that another program made.

    A trial of ours carries it as an attribute. A trial of a plain Optuna loop carries parameters only. Raises StudyError for an
    attribute that is no candidate's key.
    """
    stored = trial.user_attrs.get("candidate")
    if stored is None:
        ours = "lora_rank" in trial.params and any(name.startswith(REMOVE) for name in trial.params)
        return SearchSpace.candidate(trial.params).key if ours else None
    try:
        return _checked_key(stored)
    except (ValueError, TypeError) as error:
        fix = f"correct or remove trial {trial.number} in the study's storage"
        raise StudyError([f"trial {trial.number}, attribute candidate: {error}; {fix}"]) from None


def is_foreign(trial: FrozenTrial) -> bool:
    """Whether another program made the trial: it has parameters, and neither a candidate nor a parameter of ours."""
    ours = any(name == "lora_rank" or name.startswith(REMOVE) for name in trial.params)
    return bool(trial.params) and not ours and "candidate" not in trial.user_attrs


def is_finished(trial: FrozenTrial) -> bool:
    """Whether its candidate has an outcome: a result, an early end at a rung, or a failure that is not its worker's.

    A failed trial without the attribute `ended` comes from a plain Optuna loop: its objective raised an exception.
    """
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("ended", "failed") == "failed"
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _counts_more(trial: FrozenTrial, other: FrozenTrial) -> bool:
    """Of two trials of a candidate, the later one counts, with one exception: two workers took the candidate at once, one of
    them finished it, and the other one was killed before it could withdraw its later trial. This one was no retry, so the
    outcome stands.
    """
    earlier, later = sorted((trial, other), key=lambda t: t.number)
    was_released = later.state == TrialState.FAIL and later.user_attrs.get("ended") in RELEASED
    if was_released and is_finished(earlier) and not later.user_attrs.get("retry"):
        return trial is earlier
    return trial is later


@dataclass(frozen=True)
class StudyProgress:
    """A summary of a study's trials, made in one pass and used for several questions: a study may have ten thousand trials."""

    latest: dict[str, FrozenTrial]  # by candidate key; withdrawn duplicates are left out
    running: int  # number of trials, without those of other programs
    waiting: int  # number of enqueued trials

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> "StudyProgress":
        """Raises StudyError for a trial whose attribute `candidate` is no candidate's key."""
        latest: dict[str, FrozenTrial] = {}
        running = waiting = 0
        for trial in trials:
            state = trial.state
            running += state == TrialState.RUNNING and not is_foreign(trial)
            waiting += state == TrialState.WAITING
            key = candidate_key(trial)
            if key is None or (state == TrialState.FAIL and trial.user_attrs.get("ended") == "duplicate"):
                continue
            if key not in latest or _counts_more(trial, latest[key]):
                latest[key] = trial
        return cls(latest, running, waiting)

    @cached_property
    def finished(self) -> int:
        """Number of candidates that have an outcome and are not being evaluated again."""
        return sum(map(is_finished, self.latest.values()))

    @cached_property
    def taken(self) -> set[str]:
        """Keys of the candidates that are finished, running or enqueued: no other worker needs to evaluate them."""
        there = (TrialState.RUNNING, TrialState.WAITING)
        return {key for key, trial in self.latest.items() if trial.state in there or is_finished(trial)}

    @cached_property
    def released(self) -> list[str]:
        """Keys of the candidates that a worker released without an outcome, or whose worker died."""
        return [key for key, t in self.latest.items() if t.state == TrialState.FAIL and t.user_attrs.get("ended") in RELEASED]

    def pending(self, space: SearchSpace) -> Candidate | None:
        """The candidate to evaluate before anything is proposed: released ones first, then the named ones; None if there is
        none.
        """
        first = (*map(Candidate.from_key, self.released), *space.named.values())
        return next((c for c in first if c.key not in self.taken), None)
