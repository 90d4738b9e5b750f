"""The costs of layers that a search takes from a scan, and the scale on which it compares WERs. Shape: L removable layers."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from prunesearch.study.importance import LayerSet, pair_interactions

Array = NDArray[np.float64]

LEAST_WER = 1e-4  # logarithms begin here


def log_wer(wer: float) -> float:
    """The natural logarithm of a WER (a fraction): halving the errors lowers it equally at 4 % and at 40 %."""
    return float(np.log(max(wer, LEAST_WER)))


def layer_costs(scan: Mapping[LayerSet, float], layers: Sequence[int]) -> tuple[Array, Array]:
    """Costs of single layers (L,), and the pairs' interactions (L, L), above the diagonal: each pair's cost minus the sum of
    its two layers' costs. 0 where not measured.
    """
    alone = np.array([scan.get((i,), 0.0) for i in layers])
    beyond = np.zeros((len(layers),) * 2)
    interactions = pair_interactions(scan)
    for (a, i), (b, j) in combinations(enumerate(layers), 2):
        beyond[a, b] = interactions.get((i, j), 0.0)
    return alone, beyond
