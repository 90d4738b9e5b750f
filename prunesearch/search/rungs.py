"""When to end a trial early: when it will almost certainly end dominated.

The finished trials, with their WER at a rung and at the end, predict the final WER of a trial at that rung: a linear regression
of log WER on log WER, with Student's prediction interval for one new observation. Errors are counts, so the variance of their
logarithm falls with their number: the regression is weighted by the WER at the rung, and is less certain about good trials than
about bad ones. A trial is dominated if a finished trial with no more parameters has a lower WER. No trial waits for another:
the trials that have finished by now decide.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtr

from prunesearch.search.scan_costs import log_wer

ENOUGH = 8  # finished trials; with fewer, nothing is predicted


@dataclass(frozen=True)
class Finished:
    """A finished trial: its parameters, its dev WER (a fraction) at the end, and at the rung if it was measured there."""

    params: float
    wer: float
    wer_at_rung: float | None


def chance_of_domination(wer: float, params: float, finished: Iterable[Finished]) -> float:
    """The probability that a trial with this WER at a rung ends above the best finished trial with no more parameters.

    0 if there is no such trial, or if too few have finished for a prediction.
    """
    finished = list(finished)
    smaller = [f.wer for f in finished if f.params <= params]
    pairs = [(log_wer(f.wer_at_rung), log_wer(f.wer)) for f in finished if f.wer_at_rung is not None]
    if not smaller or len(pairs) < ENOUGH:
        return 0.0
    return _chance_above(log_wer(min(smaller)), log_wer(wer), pairs)


def _chance_above(limit: float, at: float, pairs: Sequence[tuple[float, float]]) -> float:
    """P(y > limit | x = at) for y regressed on x, both log WER; the variance of y is proportional to 1 / exp(x)."""
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
