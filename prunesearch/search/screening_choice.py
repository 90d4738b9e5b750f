"""Which layer sets to screen next: a search for the best sets of every size by their loss after the repair."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from prunesearch.search.loss_model import loss_model
from prunesearch.study.importance import LayerSet

ROUNDS = 16  # rounds that the sets of more than two layers are screened in, at least; each learns from those before
PAIRS_SHARE = 0.3  # of all sets: pairs, which the model of larger sets is learnt from
PARENTS = 4  # sets of each size whose neighbours are considered


def next_to_screen(known: Mapping[LayerSet, float], removable: Sequence[int], largest: int, most: int) -> list[LayerSet]:
    """The sets of the next round; none when `most` sets are known, or all of them.

    The first round is all single layers, and the second one pairs. From then on, a model of the losses that are known predicts
    those of neighbouring sets: with a layer more, one less, or one exchanged. Of each size up to `largest`, the sets with the
    lowest predicted loss, less one standard deviation, are screened.

    `known`: the loss of every screened set beyond that of the unpruned system; `()` has the unpruned loss itself.
    """
    left = most - sum(map(bool, known))
    singles = [s for i in removable if (s := (i,)) not in known]
    if () not in known or singles:
        return [s for s in ((), *singles) if s not in known]
    if left <= 0 or largest < 2:
        return []
    if not any(len(s) == 2 for s in known):
        return _first_pairs(known, removable, max(1, left if largest == 2 else round(PAIRS_SHARE * most)))[:left]
    return _promising(known, removable, largest, max(largest - 1, most // ROUNDS))[:left]


def _first_pairs(known: Mapping[LayerSet, float], removable: Sequence[int], count: int) -> list[LayerSet]:
    """Pairs of the cheapest layers, and each layer with the cheapest other one."""
    cost = {i: known[i,] for i in removable}
    cheap = sorted(removable, key=cost.__getitem__)
    partners = [tuple(sorted((i, next(j for j in cheap if j != i)))) for i in removable]
    ordered = sorted(combinations(removable, 2), key=lambda pair: cost[pair[0]] + cost[pair[1]])
    return list(dict.fromkeys([*sorted(partners, key=lambda pair: cost[pair[0]] + cost[pair[1]]), *ordered]))[:count]


def _promising(known: Mapping[LayerSet, float], removable: Sequence[int], largest: int, count: int) -> list[LayerSet]:
    """About `count` sets, as many of each size, and fewer where there are no more."""
    model = loss_model(removable, known)
    assert model is not None
    best = {k: sorted((s for s in known if len(s) == k), key=known.__getitem__)[:PARENTS] for k in range(1, largest + 2)}
    place = {layer: k for k, layer in enumerate(removable)}
    chosen: list[LayerSet] = []
    for size in range(2, largest + 1):
        wanted = -(-(count - len(chosen)) // (largest + 1 - size))
        near = sorted(_near(best[size - 1], best[size], best[size + 1], removable) - known.keys())
        if not near:
            continue
        bits = np.zeros((len(near), len(removable)))
        for row, layers in zip(bits, near, strict=True):
            row[[place[i] for i in layers]] = 1.0
        means, variances = model(bits)
        hopeful = np.argsort(means[:, -1] - np.sqrt(variances), kind="stable")[:wanted]
        new = [near[i] for i in hopeful]
        chosen += new
        best[size] = [*best[size], *new[:1]]  # the next size may grow from it at once
    return chosen


def _near(
    smaller: Sequence[LayerSet], same: Sequence[LayerSet], larger: Sequence[LayerSet], removable: Sequence[int]
) -> set[LayerSet]:
    """Neighbours that have the size of `same`."""
    grown = {tuple(sorted((*s, i))) for s in smaller for i in removable if i not in s}
    exchanged = {tuple(sorted({*s} - {out} | {i})) for s in same for out in s for i in removable if i not in s}
    return grown | exchanged | {tuple(i for i in s if i != out) for s in larger for out in s}
