"""When to end a trial early: when it is all but sure to come out dominated.

What a finished trial's WER was at this rung and in the end, foretells where a trial that is at the rung will end: a linear
regression of log WER on log WER, with Student's prediction interval (the textbook's, for one new observation). Errors are
counts, so the variance of their logarithm falls with their number: the regression is weighted by WER at the rung, and
says less of good trials than of bad ones. A trial is dominated if one of no more parameters has finished better. Nobody
waits for anybody: what has finished by now decides.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtr

ENOUGH = 8  # finished trials; below, nothing is foretold
LEAST_WER = 1e-4  # logarithms begin here


@dataclass(frozen=True)
class Finished:
    """A finished trial: its parameters, its dev WER (a fraction) in the end, and at the rung where it was measured there."""

    params: float
    wer: float
    wer_at_rung: float | None


def chance_of_domination(wer: float, params: float, finished: Iterable[Finished]) -> float:
    """How likely a trial of this WER at a rung is to end above the best finished one of no more parameters.

    0 where there is none, or where too few have finished to foretell anything.
    """
    finished = list(finished)
    smaller = [f.wer for f in finished if f.params <= params]
    pairs = [(_log(f.wer_at_rung), _log(f.wer)) for f in finished if f.wer_at_rung is not None]
    if not smaller or len(pairs) < ENOUGH:
        return 0.0
    return _chance_above(_log(min(smaller)), _log(wer), pairs)


def _chance_above(limit: float, at: float, pairs: Sequence[tuple[float, float]]) -> float:
    """P(y > limit | x = at) for y regressed on x, both log WER; the variance of y is taken to be inverse to exp(x)."""
    n = len(pairs)
    weights = [math.exp(x) for x, _ in pairs]
    whole = sum(weights)
    mean_x, mean_y = (sum(w * v for w, v in zip(weights, values, strict=True)) / whole for values in zip(*pairs, strict=True))
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, pairs, strict=True))
    if spread == 0:
        return 0.0
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, pairs, strict=True)) / spread
    residual = sum(w * (y - mean_y - slope * (x - mean_x)) ** 2 for w, (x, y) in zip(weights, pairs, strict=True)) / (n - 2)
    deviation = math.sqrt(residual * (1 / math.exp(at) + 1 / whole + (at - mean_x) ** 2 / spread))
    expected = mean_y + slope * (at - mean_x)
    if deviation == 0:
        return float(expected > limit)
    return float(stdtr(n - 2, (expected - limit) / deviation))


def _log(wer: float) -> float:
    return math.log(max(wer, LEAST_WER))
