"""How certain it is that one system's WER is lower than another's: a paired bootstrap over utterances and trainings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
CHUNK = 500  # resamples drawn at once: 500 weights of 8 bytes per distinct utterance stay below 64 MB for 16,000 of them


@dataclass(frozen=True)
class Difference:
    """A difference of two corpus WERs with its 95 % interval, as fractions. Negative: the first WER is lower."""

    estimate: float
    low: float
    high: float
    resamples: int

    @property
    def verdict(self) -> str:
        """`lower` or `higher` if the interval excludes zero."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "no difference can be seen"


def paired_bootstrap(
    first_errors: Counts,
    second_errors: Counts,
    reference_words: Counts,
    resamples: int = 10_000,
    seed: int = 0,
    by_training: bool = True,
) -> Difference:
    """The WER of the first system minus that of the second, both on the same utterances.

    `first_errors`, `second_errors`: (utterances,) or, for a system with several trainings, (trainings, utterances); its WER
    is the mean. `reference_words`: (utterances,).

    Utterances are drawn with replacement, the same ones for both systems, and both corpus WERs are computed again; the
    interval holds the middle 95 % of the differences (Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR
    performance evaluation", ICASSP 2004). Trainings are drawn with replacement, too. `by_training`: draw the same trainings
    for both systems, which is right if training i of both has the same seed and batches; else draw each system's trainings
    independently. From n trainings, a bootstrap shows only (n - 1) / n of their variance: half of it for two trainings.

    Raises ValueError if the shapes do not match, or if there is no utterance.
    """
    first, second = (np.atleast_2d(np.asarray(e, dtype=np.int64)) for e in (first_errors, second_errors))
    words = np.asarray(reference_words, dtype=np.int64)
    if not first.shape[1:] == second.shape[1:] == words.shape or not len(words):
        raise _not_paired(first.shape, second.shape, words.shape)
    if by_training and len(first) == len(second):
        groups, counts = [len(first)], np.vstack([first - second, words])
    else:
        groups, counts = [len(first), len(second)], np.vstack([first, -second, words])
    patterns, times = _distinct(counts.T)  # (P, trainings + 1), (P,)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        sums = rng.multinomial(len(words), times / times.sum(), size=size) @ patterns
        weights = np.hstack([_training_weights(rng, trainings, size) for trainings in groups])
        drawn.append((sums[:, :-1] * weights).sum(1) / np.maximum(1, sums[:, -1]))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    estimate = (first.mean(0).sum() - second.mean(0).sum()) / max(1, words.sum())
    return Difference(float(estimate), float(low), float(high), resamples)


def _training_weights(rng: np.random.Generator, trainings: int, size: int) -> Floats:
    """The weight of each training in the mean over as many trainings, drawn with replacement: (size, trainings)."""
    if trainings == 1:
        return np.ones((size, 1))
    return rng.multinomial(trainings, [1 / trainings] * trainings, size=size) / trainings


def _distinct(rows: Counts) -> tuple[Counts, Counts]:
    """The distinct rows, and the number of times that each occurs.

    Only an utterance's counts matter, so drawing distinct rows by a multinomial has the same distribution as drawing
    utterances, and is about fifty times faster.
    """
    patterns, times = np.unique(rows, axis=0, return_counts=True)
    return patterns, times


def _not_paired(*shapes: tuple[int, ...]) -> ValueError:
    got = " and ".join(map(str, shapes))
    return ValueError(f"a paired comparison needs counts of the same utterances, at least one, got shapes {got}")


def relative_bootstrap(
    first_errors: Counts, second_errors: Counts, resamples: int = 10_000, seed: int = 0, by_training: bool = True
) -> Difference:
    """The first system's errors divided by the second system's, minus one, on the same utterances: -0.1 means 10 % fewer.

    Arguments, resampling and errors raised are those of `paired_bootstrap`. NaN if the second system makes no errors.
    """
    first, second = (np.atleast_2d(np.asarray(e, dtype=np.int64)) for e in (first_errors, second_errors))
    if first.shape[1:] != second.shape[1:] or not first.size:
        raise _not_paired(first.shape, second.shape)
    patterns, times = _distinct(np.vstack([first, second]).T)
    rng = np.random.default_rng(seed)
    paired = by_training and len(first) == len(second)
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        sums = rng.multinomial(first.shape[1], times / times.sum(), size=size) @ patterns
        ours = _training_weights(rng, len(first), size)
        theirs = ours if paired else _training_weights(rng, len(second), size)
        drawn.append(_quotient((sums[:, : len(first)] * ours).sum(1), (sums[:, len(first) :] * theirs).sum(1)))
    every = np.concatenate(drawn)
    low, high = np.nanquantile(every, [0.025, 0.975]) if np.isfinite(every).any() else (np.nan, np.nan)
    estimate = _quotient(first.mean(0).sum(), second.mean(0).sum())
    return Difference(float(estimate), float(low), float(high), resamples)


def _quotient(ours: Any, theirs: Any) -> Any:
    """ours / theirs - 1; NaN if theirs is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(theirs > 0, ours / theirs - 1, np.nan)
