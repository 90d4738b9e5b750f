"""Strategies to compare with: what people do by hand, and what the literature does, as samplers of the same study."""

import math
import random
from collections.abc import Callable, Mapping
from itertools import combinations, zip_longest

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from prunesearch.search.samplers import CandidateSampler
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import candidate_key
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet

Scores = Mapping[LayerSet, float]


class Planned(CandidateSampler):
    """A plan of sets, with each rank in turn; then random ones."""

    def __init__(self, space: SearchSpace, seed: int, sets: list[LayerSet]):
        super().__init__(space, seed)
        self._plan = [Candidate(layers, rank) for rank in space.ranks for layers in sets]

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        return next((c for c in self._plan if c.key not in seen), None)


class TrainedGreedy(CandidateSampler):
    """Removes one layer at a time for good: tries every layer beside those already gone, keeps the best, goes on; the
    trials are its scan. Then the same with the next rank."""

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        wer = {candidate_key(t): t.values[0] for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])}
        for rank in self._space.ranks:
            gone: LayerSet = ()
            if Candidate(gone, rank).key not in seen:
                return Candidate(gone, rank)
            while len(gone) < self._space.max_removed:
                tries = [Candidate((*gone, i), rank) for i in self._space.removable if i not in gone]
                if new := [c for c in tries if c.key not in seen]:
                    return new[0]
                gone = min(tries, key=lambda c: wer.get(c.key, math.inf)).removed_layers
        return None


def fittest(study: Study, size: int) -> FrozenTrial | None:
    """Of the finished trials with so many layers removed, the one that errs least."""
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    same = [t for t in finished if len(SearchSpace.candidate(t.params).removed_layers) == size]
    return min(same, key=lambda t: t.values[0], default=None)


class Evolution(CandidateSampler):
    """Evolution after EvoPress (arXiv 2410.14649), for each number of removed layers in turn: its mutation, an exchange of
    layers, and its elitism. Offspring come one by one, and each may be the next parent (1 + 1), where it draws a batch."""

    def propose(
        self, study: Study, trial: FrozenTrial | None, seen: set[str], begun: int, rng: random.Random
    ) -> Candidate | None:
        space = self._space
        size = space.max_removed - begun % (space.max_removed + 1)
        best = fittest(study, size)
        if best is None or size in (0, len(space.removable)):
            drawn = Candidate(tuple(sorted(rng.sample(space.removable, size))), rng.choice(space.ranks))
            return None if drawn.key in seen else drawn
        parent = space.candidate(best.params)
        for _ in range(50):
            layers = set(parent.removed_layers)
            for _ in range(1 + (rng.random() < 0.3)):
                layers.discard(rng.choice(sorted(layers)))
                layers.add(rng.choice([i for i in space.removable if i not in layers]))
            rank = parent.lora_rank if rng.random() < 0.7 else rng.choice(space.ranks)
            candidate = Candidate(tuple(sorted(layers)), rank)
            if candidate.key not in seen:
                return candidate
        return None


def prefixes(space: SearchSpace, order: list[int]) -> list[LayerSet]:
    """The sets of one order of removal, one layer more each time."""
    return [tuple(sorted(order[:k])) for k in range(space.max_removed + 1)]


def by_score(space: SearchSpace, scan: Scores) -> list[int]:
    """Least costly first, by single layers alone."""
    return sorted(space.removable, key=lambda i: scan[i,])


def scanned_greedy(space: SearchSpace, scan: Scores) -> list[LayerSet]:
    """One layer after the other, each time the one that the scan says costs least beside those that are gone. Of sets that the
    scan has not measured, singles and pairs are added up."""

    def cost(layers: LayerSet) -> float:
        if layers in scan:
            return scan[layers]
        beyond = sum(scan[p] - scan[p[:1]] - scan[p[1:]] for p in combinations(layers, 2) if p in scan)
        return sum(scan[i,] for i in layers) + beyond

    sets: list[LayerSet] = [()]
    for _ in range(space.max_removed):
        tries = [tuple(sorted((*sets[-1], i))) for i in space.removable if i not in sets[-1]]
        sets.append(min(tries, key=cost))
    return sets


def best_screened(space: SearchSpace, scan: Scores) -> list[LayerSet]:
    """The best set of each size, then the second best ones, and so on."""
    ordered: dict[int, list[LayerSet]] = {}
    for layers in sorted(scan, key=scan.__getitem__):
        ordered.setdefault(len(layers), []).append(layers)
    return [s for row in zip_longest(*(ordered[k] for k in sorted(ordered))) for s in row if s is not None]


def block_influence_order(space: SearchSpace, seed: int, block_influence: Scores) -> CandidateSampler:
    """Layers that turn their input least go first (ShortGPT, arXiv 2403.03853)."""
    return Planned(space, seed, prefixes(space, by_score(space, block_influence)))


def evenly_spaced(space: SearchSpace) -> list[LayerSet]:
    layers, sets = space.removable, []
    for k in range(space.max_removed + 1):
        sets.append(tuple(sorted({layers[round((j + 0.5) * len(layers) / k - 0.5)] for j in range(k)})))
    return sets


STRATEGIES: dict[str, Callable[[SearchSpace, int, Scores], CandidateSampler]] = {
    "top-down": lambda space, seed, scan: Planned(space, seed, prefixes(space, sorted(space.removable, reverse=True))),
    "evenly spaced": lambda space, seed, scan: Planned(space, seed, evenly_spaced(space)),
    "leave-one-out order": lambda space, seed, scan: Planned(space, seed, prefixes(space, by_score(space, scan))),
    "iterative greedy, by the scan": lambda space, seed, scan: Planned(space, seed, scanned_greedy(space, scan)),
    "screened sets, best first": lambda space, seed, scan: Planned(space, seed, best_screened(space, scan)),
    "iterative greedy, by training": lambda space, seed, scan: TrainedGreedy(space, seed),
    "evolution": lambda space, seed, scan: Evolution(space, seed),
}

SCREENING = ("leave-one-out order", "iterative greedy, by the scan", "screened sets, best first")  # those that use a scan
