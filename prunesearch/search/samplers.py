"""Optuna samplers that never propose the same candidate twice, nor one outside the space."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.scan_proposer import ScanProposer
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet

WORST_GROUP_WER = "worst_group_wer"  # a trial's attribute, and its constraint where the study has a limit
ATTEMPTS = 30  # proposals of the inner sampler, before a random candidate takes their place


class SpaceExhausted(Exception):
    """Every candidate of the space has been evaluated, or is being evaluated."""


class CandidateSampler(BaseSampler):
    """Proposes what is due (`StudyProgress.due`), then asks `propose` for a candidate, and sees to it that none is proposed
    twice, nor one outside the space.

    Randomness comes from the seed and the number of settled trials alone: a study that was killed and resumed proposes
    what it would have.
    """

    def __init__(self, space: SearchSpace, seed: int):
        self._space = space
        self._seed = seed

    needs_trial = False  # whether `propose` can do without a trial that it is for

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        """A candidate whose key is not among `seen`; None to have a random one drawn. `begun`: trials settled or running."""
        return None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        others = StudyProgress.of(t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
        candidate = self.choose(study, trial, others)
        if "fixed_params" not in trial.system_attrs:  # of one that somebody has enqueued, they count
            study._storage.set_trial_user_attr(trial._trial_id, "candidate", candidate.key)
        return self._space.params(candidate)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """A candidate that fails under `study.optimize` has had its turn."""
        if state == TrialState.FAIL and "candidate" in trial.user_attrs and "ended" not in trial.user_attrs:
            study._storage.set_trial_user_attr(trial._trial_id, "ended", "failed")

    def choose(self, study: Study, trial: FrozenTrial | None, others: StudyProgress) -> Candidate:
        """The next candidate, `others` being all trials but the one that it is for. Raises SpaceExhausted."""
        if due := others.due(self._space):
            return due
        rng = random.Random(f"{self._seed} {others.settled} {others.running}")
        seen = set(others.taken)
        proposed = self.propose(study, trial, seen, others.settled + others.running, rng)
        if proposed is not None:
            return proposed
        for _ in range(10 * ATTEMPTS):
            candidate = self._space.draw(rng)
            if candidate.key not in seen:
                return candidate
        left = [c for c in self._space.everything() if c.key not in seen]
        if not left:
            raise SpaceExhausted
        return rng.choice(left)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise RuntimeError(f"{param_name} is not a parameter of this study")


class GridSampler(CandidateSampler):
    """The whole space, small sets first."""

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        return next((c for c in self._space.everything() if c.key not in seen), None)


class OptunaSampler(CandidateSampler):
    """One of Optuna's samplers over one boolean per layer. What it proposes is repaired into the space, and asked again if
    it was seen before. The first `startup_trials` beside the named ones are sets of every size, of the scan's liking."""

    needs_trial = True  # NSGA-II writes to it
    first_temperature = 0.3

    def __init__(
        self,
        space: SearchSpace,
        inner: Callable[[int], BaseSampler],
        seed: int,
        startup_trials: int,
        scan: Mapping[LayerSet, float] | None = None,
    ):
        super().__init__(space, seed)
        self._inner = inner
        self._startup_trials = startup_trials
        self._guide = ScanProposer(space, scan)

    def choose(self, study: Study, trial: FrozenTrial | None, others: StudyProgress) -> Candidate:
        if trial is not None and isinstance(inner := self._inner(0), NSGAIISampler):
            inner.get_trial_generation(study, trial)  # written down: what it has not proposed may become a parent too
        return super().choose(study, trial, others)

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        if (number := begun - len(self._space.named)) < self._startup_trials:
            return self._guide.first(max(0, number), seen, rng, self.first_temperature)
        assert trial is not None
        inner = self._inner(rng.randrange(2**31))
        for _ in range(ATTEMPTS):
            proposed = inner.sample_relative(study, trial, self._space.distributions)
            if not proposed:
                return None
            # what a genetic sampler mutates, it leaves out
            whole = {**self._space.params(self._space.draw(rng)), **proposed}
            candidate = self._space.repaired(self._space.candidate(whole), rng)
            if candidate.key not in seen:
                return candidate
        return None


def optuna_sampler(
    name: str, space: SearchSpace, seed: int, startup_trials: int, scan: Mapping[LayerSet, float] | None = None
) -> CandidateSampler:
    """`tpe` (multivariate: layers interact), `nsga2`, `gp`, `random` or `grid`."""

    def inner(number: int) -> BaseSampler:
        if name == "tpe":
            return TPESampler(multivariate=True, n_startup_trials=0, n_ei_candidates=48, seed=number)
        if name == "nsga2":
            return NSGAIISampler(population_size=16, seed=number)
        return GPSampler(n_startup_trials=0, deterministic_objective=False, seed=number)

    if name == "random":  # sets of every size alike; independent booleans would hardly ever draw a small one
        return CandidateSampler(space, seed)
    if name == "grid":
        return GridSampler(space, seed)
    return OptunaSampler(space, inner, seed, startup_trials, scan)
