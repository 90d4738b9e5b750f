"""Sets of layers that a scan speaks for: what a search begins with, and looks at beside its front's neighbours."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from prunesearch.candidate import Candidate
from prunesearch.scan import LayerSet
from prunesearch.search.space import SearchSpace


class Guide:
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
        self._scale = float(np.median(np.abs(self._alone))) + 1e-12

    def first(self, number: int, seen: set[str], rng: random.Random) -> Candidate | None:
        """What to begin with: sets of most layers, of one, of one less than most, of two, and so on; of none at the end."""
        most = self._space.max_removed
        sizes = [*sorted(range(1, most + 1), key=lambda k: (min(k, most + 1 - k), -k)), 0]
        size = sizes[number % (most + 1)]
        luck = np.random.default_rng(rng.getrandbits(32))
        for _ in range(20):
            candidate = Candidate(self.draw([size], 0.3, luck)[0], rng.choice(self._space.ranks))
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
