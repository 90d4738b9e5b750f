"""What a scan says about the loss of any layer set: measured, or predicted from what was measured.

Shapes: N layer sets, L removable layers.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from prunesearch.search.scan_costs import Array, layer_costs
from prunesearch.search.surrogate import FIT_AT_MOST, LossModel, Posterior, Surrogate
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet

LEAST_SHARE = 0.1  # a set is never predicted to have less than this share of the unpruned loss


def loss_model(layers: Sequence[int], scan: Mapping[LayerSet, float] | None) -> LossModel | None:
    """The model for a scan's measurements; None without a scan.

    `scan`: how much removing a set adds to the loss. Its entry `()` is the unpruned loss.
    """
    if not scan or not any(scan.keys()):
        return None
    added = AddedLoss(layers, scan)
    return ScreenedLoss(layers, scan, added) if any(len(s) > 2 for s in scan) else added


class AddedLoss:
    """Adds up the costs of layers and of pairs. `level`: the unpruned loss, on top of which they come."""

    def __init__(self, layers: Sequence[int], scan: Mapping[LayerSet, float]):
        self._alone, self._beyond = layer_costs(scan, layers)
        self.level = scan.get(()) or float(np.median(np.abs(self._alone))) + 1e-12

    def __call__(self, bits: Array) -> tuple[Array, Array]:
        """(N, 2): the logarithm of the loss by layers alone, and with pairs; (N,): zeros, since it knows no error."""
        alone = bits @ self._alone
        both = alone + np.einsum("na,ab,nb->n", bits, self._beyond, bits)
        return np.stack([self.logarithm(alone), self.logarithm(both)], 1), np.zeros(len(bits))

    def logarithm(self, increase: Array) -> Array:
        """Of the loss, from the increase beyond the unpruned loss."""
        logarithm: Array = np.log(self.level + np.maximum(increase, (LEAST_SHARE - 1) * self.level))
        return logarithm


class ScreenedLoss:
    """Predicts the loss of a set from the losses of sets that were measured, by a Gaussian process over sets. A measured set
    has its own value.
    """

    def __init__(self, layers: Sequence[int], scan: Mapping[LayerSet, float], added: AddedLoss):
        sets = [s for s in scan if s and set(s) <= set(layers)]
        values = added.logarithm(np.array([scan[s] for s in sets]))
        self._surrogate = Surrogate(tuple(layers), (0,), added)
        candidates = [Candidate(s) for s in sets]
        bits = self._surrogate.bits(candidates).astype(bool)
        self._known = {row.tobytes(): (value, 0.0) for row, value in zip(bits, values, strict=True)}
        order = np.argsort(values, kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, min(len(order), FIT_AT_MOST)).astype(int)]
        self._surrogate.fit([candidates[i] for i in chosen], values[chosen], np.zeros(len(chosen)))
        self._posterior: Posterior = self._surrogate.given(candidates, values, np.zeros(len(values)))

    def __call__(self, bits: Array) -> tuple[Array, Array]:
        """(N, 1): the logarithm of the loss; (N,): its variance, 0 where the set was measured."""
        rows = [row.tobytes() for row in bits.astype(bool)]
        new = list(dict.fromkeys(row for row in rows if row not in self._known))
        if new:
            asked = np.array([np.frombuffer(row, dtype=bool) for row in new]).astype(float)
            means, deviations = self._posterior.predict_encoded(self._surrogate.encode_bits(asked))
            self._known |= {row: (m, d**2) for row, m, d in zip(new, means, deviations, strict=True)}
        found = np.array([self._known[row] for row in rows]).reshape(-1, 2)
        return found[:, :1], found[:, 1]
