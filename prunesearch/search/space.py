"""The candidates of a study, and how Optuna sees them: one boolean for each layer, and an integer for the LoRA rank."""

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from prunesearch.study.candidate import Candidate, baselines, count_candidates
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.search_config import MOST_LISTED

REMOVE = "remove_"  # begins the names of the booleans

ParamsOf = Callable[[Candidate], float]  # a candidate's number of parameters: the objective that is known before training


def candidate_params(candidate: Candidate, names: Collection[str]) -> dict[str, Any]:
    """The candidate as values of the Optuna parameters of these names."""
    bits = {n: int(n.removeprefix(REMOVE)) in candidate.removed_layers for n in names if n.startswith(REMOVE)}
    return bits | {"lora_rank": candidate.lora_rank} | ({"repeat": candidate.repeat} if "repeat" in names else {})


@dataclass(frozen=True)
class SearchSpace:
    """Every set of at most `max_removed` of the `removable` layers, with each of the `ranks`.

    `named` candidates are evaluated in any case: the baselines (by name) and the study's fixed candidates (by key). They need
    not lie within the space.
    """

    removable: tuple[int, ...]
    max_removed: int
    ranks: tuple[int, ...]
    named: Mapping[str, Candidate]
    repeats: int = 0  # further trainings of one system, each from another seed

    @classmethod
    def of(cls, config: StudyConfig, encoder_layers: int) -> "SearchSpace":
        trained = config.training.steps > 0  # without training, a LoRA changes nothing
        named = baselines(encoder_layers, config.search.baseline_lora_rank)
        named = {name: c for name, c in named.items() if trained or not c.lora_rank}
        taken = set(named.values())
        named |= {c.key: c for c in config.fixed_candidates() if c not in taken}
        return cls(
            config.removable(encoder_layers),
            config.max_removed(encoder_layers),
            config.search.lora_ranks if trained else (0,),
            named,
            config.search.repeats,
        )

    @property
    def size(self) -> int:
        """Number of candidates in the space; named candidates outside it are not counted."""
        return count_candidates(len(self.removable), self.max_removed, len(self.ranks))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's parameters. They also cover the named candidates outside the space; the sampler keeps to the space."""
        layers = sorted({*self.removable, *(i for c in self.named.values() for i in c.removed_layers)})
        ranks = sorted({*self.ranks, *(c.lora_rank for c in self.named.values())})
        bits: dict[str, BaseDistribution] = {f"{REMOVE}{i}": CategoricalDistribution([False, True]) for i in layers}
        most = max([self.repeats, *(c.repeat for c in self.named.values())])
        repeat: dict[str, BaseDistribution] = {"repeat": IntDistribution(0, most)} if most else {}
        # an integer, not a category: Optuna accepts a wider range in later trials of a study, but no further categories
        return bits | {"lora_rank": IntDistribution(0, max(ranks))} | repeat

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """The trial's candidate, by the suggest calls of any Optuna objective. The study's sampler decides their values."""
        params: dict[str, Any] = {}
        for name, distribution in self.distributions.items():
            if isinstance(distribution, IntDistribution):
                params[name] = trial.suggest_int(name, distribution.low, distribution.high)
            else:
                params[name] = trial.suggest_categorical(name, [False, True])
        return self.candidate(params)

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate as Optuna's parameters."""
        return candidate_params(candidate, self.distributions)

    @staticmethod
    def candidate(params: Mapping[str, Any]) -> Candidate:
        """The inverse of `params`."""
        layers = tuple(int(n.removeprefix(REMOVE)) for n, removed in params.items() if n.startswith(REMOVE) and removed)
        return Candidate(layers, int(params["lora_rank"]), int(params.get("repeat", 0)))

    def draw(self, rng: random.Random) -> Candidate:
        """A random candidate: first the number of removed layers, then the layers. All sizes are equally likely; otherwise
        small sets would be rare.
        """
        count = rng.randint(0, self.max_removed)
        return Candidate(tuple(rng.sample(self.removable, count)), rng.choice(self.ranks))

    def clipped(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """The candidate moved into the space: random layers are put back until it is small enough, and the rank is the nearest
        one.
        """
        layers = [i for i in candidate.removed_layers if i in self.removable]
        rank = min(self.ranks, key=lambda r: abs(r - candidate.lora_rank))
        return Candidate(tuple(rng.sample(layers, min(len(layers), self.max_removed))), rank)

    def everything(self) -> list[Candidate]:
        """The whole space, small sets first. Raises StudyError for a space too large to list."""
        if self.size > MOST_LISTED:
            rule = f"the space must have at most {MOST_LISTED:,} candidates to be listed, got {self.size:,}"
            raise StudyError([f"search: {rule}; lower search.max_removed, or choose another search.sampler than grid"])
        sets = [s for k in range(self.max_removed + 1) for s in combinations(self.removable, k)]
        return [Candidate(s, rank) for s in sets for rank in self.ranks]
