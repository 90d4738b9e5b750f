"""Optuna samplers that never propose a candidate twice, and never one outside the space."""

import random
from collections.abc import Callable, Mapping, Set
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.scan_proposer import ScanProposer
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet

WORST_GROUP_WER = "worst_group_wer"  # a trial's attribute, and its constraint if the study has a limit
ATTEMPTS = 30  # proposals asked of Optuna's sampler before a random candidate is drawn instead


class SpaceExhausted(Exception):
    """Every candidate of the space has been evaluated or is being evaluated."""


class CandidateSampler(BaseSampler):
    """Proposes pending candidates first (`StudyProgress.pending`), then what `propose` returns, or a random candidate if it
    returns None.

    Random numbers depend on the seed and on the numbers of finished and running trials only: a study that was killed and
    resumed makes the proposals that it would have made.
    """

    def __init__(self, space: SearchSpace, seed: int):
        self._space = space
        self._seed = seed

    needs_trial = False  # whether `propose` needs the trial that it proposes for

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        """A candidate whose key is not in `seen`; None: the caller draws one at random.

        `trial`: the trial that the proposal is for, if there is one already. `begun`: number of finished and running trials.
        """
        return None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        others = StudyProgress.of(t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
        return self._space.params(self.choose(study, trial, others))

    def choose(self, study: Study, trial: FrozenTrial | None, others: StudyProgress) -> Candidate:
        """The next candidate; `others` summarises all trials except `trial`. Raises SpaceExhausted."""
        if pending := others.pending(self._space):
            return pending
        rng = random.Random(f"{self._seed} {others.finished} {others.running}")
        seen = set(others.taken)
        proposed = self.propose(study, trial, seen, others.finished + others.running, rng)
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
    """Proposes the whole space in order, small sets first."""

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        return next((c for c in self._space.everything() if c.key not in seen), None)


class OptunaSampler(CandidateSampler):
    """One of Optuna's samplers over one boolean per layer. A proposal outside the space is moved into it; a proposal that was
    made before is asked for again. The first `startup_trials` after the named candidates come from the scan proposer: sets of
    every size."""

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
        self._scan_proposer = ScanProposer(space, scan)

    def choose(self, study: Study, trial: FrozenTrial | None, others: StudyProgress) -> Candidate:
        if trial is not None and isinstance(inner := self._inner(0), NSGAIISampler):
            inner.get_trial_generation(study, trial)  # stores it, so that candidates of other origin can become parents too
        return super().choose(study, trial, others)

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        if (number := begun - len(self._space.named)) < self._startup_trials:
            return self._scan_proposer.propose(max(0, number), seen, rng, self.first_temperature)
        assert trial is not None
        inner = self._inner(rng.randrange(2**31))
        if isinstance(inner, GPSampler):
            study, trial = _with_whole_trials(study, trial, self._space.distributions.keys())
            if not any(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)):
                return None
        for _ in range(ATTEMPTS):
            proposed = inner.sample_relative(study, trial, self._space.distributions)
            if not proposed:
                return None
            # a genetic sampler leaves out the parameters that it mutates
            whole = {**self._space.params(self._space.draw(rng)), **proposed}
            candidate = self._space.clipped(self._space.candidate(whole), rng)
            if candidate.key not in seen:
                return candidate
        return None


def _with_whole_trials(study: Study, trial: FrozenTrial, names: Set[str]) -> tuple[Study, FrozenTrial]:
    """The study and the trial, without complete trials that lack a parameter: on these, Optuna's Gaussian process fails.

    They are trials of other programs, and those from before a fixed candidate added a parameter. If there are any, the study is
    a copy in memory.
    """
    trials = study.get_trials(deepcopy=False)
    whole = [t for t in trials if t.state != TrialState.COMPLETE or names <= t.params.keys()]
    if len(whole) == len(trials):
        return study, trial
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(t for t in whole if t.number != trial.number)
    number = copy.ask().number
    return copy, copy.get_trials(deepcopy=False)[number]


def optuna_sampler(
    name: str, space: SearchSpace, seed: int, startup_trials: int, scan: Mapping[LayerSet, float] | None = None
) -> CandidateSampler:
    """The sampler of that name: `tpe` (multivariate, since layers interact), `nsga2`, `gp`, `random` or `grid`."""

    def inner(number: int) -> BaseSampler:
        if name == "tpe":
            return TPESampler(multivariate=True, n_startup_trials=0, n_ei_candidates=48, seed=number)
        if name == "nsga2":
            return NSGAIISampler(population_size=16, seed=number)
        return GPSampler(n_startup_trials=0, deterministic_objective=False, seed=number)

    if name == "random":  # all sizes are equally likely; independent booleans would hardly ever draw a small set
        return CandidateSampler(space, seed)
    if name == "grid":
        return GridSampler(space, seed)
    return OptunaSampler(space, inner, seed, startup_trials, scan)
