"""Sets of layers that a scan speaks for: what a search begins with, and looks at beside its front's neighbours."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet


def spread_sizes(most: int) -> list[int]:
    """Every size from 0 to `most` once, in van der Corput's order: most, half of that, the quarters, the eighths."""
    fractions = (int(f"{n:08b}"[::-1], 2) / 256 for n in range(256))
    return list(dict.fromkeys(round(most * (1 - x)) for x in fractions))


class ScanProposer:
    """Draws sets one layer after the other, likelier the less it costs beside those taken; at random without a scan."""

    def __init__(self, space: SearchSpace, scan: Mapping[LayerSet, float] | None):
        self._space = space
        scan = scan or {}
        self._layers = sorted(space.removable)
        self._alone = np.array([scan.get((i,), 0.0) for i in self._layers])
        self._beyond = np.zeros((len(self._layers),) * 2)
        for (a, i), (b, j) in combinations(enumerate(self._layers), 2):
            pair = scan.get((i, j))
            self._beyond[a, b] = self._beyond[b, a] = 0.0 if pair is None else pair - self._alone[a] - self._alone[b]
        self._sizes = spread_sizes(space.max_removed)
        self._scale = float(np.median(np.abs(self._alone))) + 1e-12

    def first(self, number: int, seen: set[str], rng: random.Random, temperature: float) -> Candidate | None:
        """What to begin with: sets that the scan speaks for, of sizes that soon lie everywhere between most and none."""
        size = self._sizes[number % len(self._sizes)]
        luck = np.random.default_rng(rng.getrandbits(32))
        for attempt in range(20):  # warmer and warmer, where the cheapest ones are taken
            warmth = temperature * (1 + attempt / 4)
            candidate = Candidate(self.draw([size], warmth, luck)[0], rng.choice(self._space.ranks))
            if candidate.key not in seen:
                return candidate
        return None

    def draw(self, sizes: Sequence[int], temperature: float, rng: np.random.Generator) -> list[LayerSet]:
        """A set of each size; low temperatures keep to what is cheapest, an infinite one does not look."""
        costs = np.tile(self._alone, (len(sizes), 1))
        taken = np.zeros(costs.shape, dtype=bool)
        for step in range(max(sizes, default=0)):
            going = np.flatnonzero(np.array(sizes) > step)
            luck = rng.gumbel(size=(len(going), costs.shape[1]))
            wanted = np.where(taken[going], -np.inf, luck - costs[going] / (temperature * self._scale))
            chosen = wanted.argmax(1)
            taken[going, chosen] = True
            costs[going] += self._beyond[chosen]
        return [tuple(self._layers[k] for k in np.flatnonzero(row)) for row in taken]
