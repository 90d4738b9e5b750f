"""Layer sets that a scan finds cheap: the first proposals of a search, and a part of its later pool."""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from prunesearch.search.scan_costs import layer_costs
from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet


def spread_sizes(most: int) -> list[int]:
    """Every size from 0 to `most` once, in van der Corput order: most, half of it, the quarters, the eighths."""
    fractions = (int(f"{n:08b}"[::-1], 2) / 256 for n in range(256))
    return list(dict.fromkeys(round(most * (1 - x)) for x in fractions))


class ScanProposer:
    """Draws sets layer by layer. The less a layer adds to the scan's cost of the layers drawn so far, the likelier it is.
    Without a scan, all layers are equally likely.

    `scan`: cost of single layers, and of larger sets where they were measured. Of more than two layers, the cheapest measured
    sets are proposed first.
    """

    def __init__(self, space: SearchSpace, scan: Mapping[LayerSet, float] | None):
        self._space = space
        scan = scan or {}
        self._layers = sorted(space.removable)
        self._alone, beyond = layer_costs(scan, self._layers)
        self._beyond = beyond + beyond.T
        self._sizes = spread_sizes(space.max_removed)
        larger = sorted((s for s in scan if len(s) > 2 and set(s) <= set(self._layers)), key=lambda s: scan[s])
        self._measured: dict[int, list[LayerSet]] = {}
        for layers in larger:
            self._measured.setdefault(len(layers), []).append(layers)
        self._scale = float(np.median(np.abs(self._alone))) + 1e-12

    def propose(self, number: int, seen: set[str], rng: random.Random, temperature: float) -> Candidate | None:
        """The `number`-th first proposal: a cheap set. Successive sizes soon cover the range from `max_removed` to 0."""
        size = self._sizes[number % len(self._sizes)]
        for layers in self._measured.get(size, ()):
            candidate = Candidate(layers, rng.choice(self._space.ranks))
            if candidate.key not in seen:
                return candidate
        noise = np.random.default_rng(rng.getrandbits(32))
        for attempt in range(20):  # the temperature rises, in case the cheapest sets are taken
            warmth = temperature * (1 + attempt / 4)
            candidate = Candidate(self.draw([size], warmth, noise)[0], rng.choice(self._space.ranks))
            if candidate.key not in seen:
                return candidate
        return None

    def cheapest(self, count: int) -> list[LayerSet]:
        """Of each size above two, so many measured sets."""
        return [layers for size in self._measured.values() for layers in size[:count]]

    def draw(self, sizes: Sequence[int], temperature: float, rng: np.random.Generator) -> list[LayerSet]:
        """One set for each size. A low temperature keeps to the cheapest layers; an infinite one ignores the scan."""
        costs = np.tile(self._alone, (len(sizes), 1))
        taken = np.zeros(costs.shape, dtype=bool)
        for step in range(max(sizes, default=0)):
            going = np.flatnonzero(np.array(sizes) > step)
            noise = rng.gumbel(size=(len(going), costs.shape[1]))
            wanted = np.where(taken[going], -np.inf, noise - costs[going] / (temperature * self._scale))
            chosen = wanted.argmax(1)
            taken[going, chosen] = True
            costs[going] += self._beyond[chosen]
        return [tuple(self._layers[k] for k in np.flatnonzero(row)) for row in taken]
