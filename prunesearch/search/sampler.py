"""An Optuna sampler that never proposes the same candidate twice, nor one outside the space."""

import random
from collections.abc import Callable
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.space import SearchSpace

ATTEMPTS = 30  # proposals of the inner sampler, before a random candidate takes their place


class SpaceExhausted(Exception):
    """Every candidate of the space has been evaluated, or is being evaluated."""


def is_settled(trial: FrozenTrial) -> bool:
    """Its candidate has an outcome: a result, an early end at a rung, or a failure of its own (not of its worker)."""
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("ended") == "failed"
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def is_taken(trial: FrozenTrial) -> bool:
    """Nobody else need evaluate its candidate."""
    return trial.state in (TrialState.RUNNING, TrialState.WAITING) or is_settled(trial)


class CandidateSampler(BaseSampler):
    """Wraps an Optuna sampler: the first `startup_trials` are random sets, sized uniformly; then `inner` proposes.

    What `inner` proposes is repaired into the space, and asked again if it was seen before. Randomness comes from the
    seed and the number of settled trials alone: a study that was killed and resumed proposes what it would have.
    """

    def __init__(self, space: SearchSpace, inner: Callable[[int], BaseSampler], seed: int, startup_trials: int):
        self._space = space
        self._inner = inner
        self._seed = seed
        self._startup_trials = startup_trials

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        settled = sum(map(is_settled, others))
        running = sum(t.state == TrialState.RUNNING for t in others)
        seen = {key for t in others if is_taken(t) and (key := t.user_attrs.get("candidate"))}
        rng = random.Random(f"{self._seed} {settled} {running}")
        if settled >= self._startup_trials:
            inner = self._inner(rng.randrange(2**31))
            for _ in range(ATTEMPTS):
                proposed = inner.sample_relative(study, trial, search_space)
                if not proposed:
                    break
                # what a genetic sampler mutates, it leaves out
                whole = {**self._space.params(self._space.draw(rng)), **proposed}
                candidate = self._space.repaired(self._space.candidate(whole), rng)
                if candidate.key not in seen:
                    return self._space.params(candidate)
        for _ in range(10 * ATTEMPTS):
            candidate = self._space.draw(rng)
            if candidate.key not in seen:
                return self._space.params(candidate)
        left = [c for c in self._space.everything() if c.key not in seen]
        if not left:
            raise SpaceExhausted
        return self._space.params(rng.choice(left))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise RuntimeError(f"{param_name} is not a parameter of this study")


def make_sampler(name: str, space: SearchSpace, seed: int, startup_trials: int) -> CandidateSampler:
    """`tpe` (multivariate: layers interact), `nsga2` or `random`, over one boolean per layer."""

    def inner(number: int) -> BaseSampler:
        if name == "tpe":
            return TPESampler(multivariate=True, n_startup_trials=0, n_ei_candidates=48, seed=number)
        if name == "nsga2":
            return NSGAIISampler(population_size=16, seed=number)
        return RandomSampler(seed=number)

    return CandidateSampler(space, inner, seed, startup_trials)
