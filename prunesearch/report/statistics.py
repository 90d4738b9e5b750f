"""Is one system's word error rate really lower than another's? A paired bootstrap over utterances, and over trainings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
CHUNK = 500  # resamples drawn at once: 500 weights of 8 bytes for each distinct utterance stay below 64 MB


@dataclass(frozen=True)
class Difference:
    """A difference of two corpus WERs (a fraction; negative: the first is lower) with its 95 % interval."""

    estimate: float
    low: float
    high: float
    resamples: int

    @property
    def verdict(self) -> str:
        """`lower` or `higher` where the interval excludes zero."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "no difference can be seen"


def paired_bootstrap(
    first_errors: Counts,
    second_errors: Counts,
    reference_words: Counts,
    resamples: int = 10_000,
    seed: int = 0,
    by_training: bool = True,
) -> Difference:
    """WER of the first system less that of the second, both on the same utterances.

    Errors: (utterances,), or (trainings, utterances) of a system that was trained several times, whose WER is the mean;
    words: (utterances,). Utterances are drawn with replacement, the same for both systems, and corpus WERs recomputed; the
    interval holds the middle 95 % of the differences (Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR
    performance evaluation", ICASSP 2004). Trainings are drawn with replacement as well: `by_training`, the same of both
    (which have the same seeds and batches, then, and are equally many), else each system's by themselves. Of very few
    trainings, a bootstrap sees less than all of their spread: of two, half of the variance, of three, two thirds.
    """
    first, second = (np.atleast_2d(np.asarray(e, dtype=np.int64)) for e in (first_errors, second_errors))
    words = np.asarray(reference_words, dtype=np.int64)
    if not first.shape[1:] == second.shape[1:] == words.shape or not len(words):
        shapes = f"{first.shape}, {second.shape} and {words.shape}"
        raise ValueError(f"a paired comparison needs counts of the same utterances, at least one, got shapes {shapes}")
    if by_training and len(first) == len(second):
        counts = np.vstack([first - second, words])
        weigh = _means(len(first))
    else:
        counts = np.vstack([first, -second, words])
        ours, theirs = _means(len(first)), _means(len(second))

        def weigh(rng: np.random.Generator, size: int) -> Floats:
            return np.hstack([ours(rng, size), theirs(rng, size)])

    patterns, times = _distinct(counts.T)  # (P, trainings + 1), (P,)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        sums = rng.multinomial(len(words), times / times.sum(), size=size) @ patterns
        drawn.append((sums[:, :-1] * weigh(rng, size)).sum(1) / np.maximum(1, sums[:, -1]))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    estimate = (first.mean(0).sum() - second.mean(0).sum()) / max(1, words.sum())
    return Difference(float(estimate), float(low), float(high), resamples)


def _means(trainings: int) -> Callable[[np.random.Generator, int], Floats]:
    """Draws how much each training counts in a mean over as many, drawn with replacement: (size, trainings)."""

    def draw(rng: np.random.Generator, size: int) -> Floats:
        if trainings == 1:
            return np.ones((size, 1))
        return rng.multinomial(trainings, [1 / trainings] * trainings, size=size) / trainings

    return draw


def _distinct(rows: Counts) -> tuple[Counts, Counts]:
    """The distinct rows and how often each is there: an utterance matters through its counts alone, so a multinomial over
    these is the same distribution as one over the utterances, some fifty times faster."""
    patterns, times = np.unique(rows, axis=0, return_counts=True)
    return patterns, times


def relative_bootstrap(
    first_errors: Counts, second_errors: Counts, resamples: int = 10_000, seed: int = 0, by_training: bool = True
) -> Difference:
    """Errors of the first system over those of the second, less one, both on the same utterances: -0.1 is a tenth fewer.

    Arrays and resampling as in `paired_bootstrap`. Where the second makes no error, it is nan.
    """
    first, second = (np.atleast_2d(np.asarray(e, dtype=np.int64)) for e in (first_errors, second_errors))
    if first.shape[1:] != second.shape[1:] or not first.size:
        shapes = f"{first.shape} and {second.shape}"
        raise ValueError(f"a paired comparison needs counts of the same utterances, at least one, got shapes {shapes}")
    patterns, times = _distinct(np.vstack([first, second]).T)
    rng = np.random.default_rng(seed)
    ours, theirs = _means(len(first)), _means(len(second))
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        sums = rng.multinomial(first.shape[1], times / times.sum(), size=size) @ patterns
        weights = ours(rng, size)
        others = weights if by_training and len(first) == len(second) else theirs(rng, size)
        drawn.append(_quotient((sums[:, : len(first)] * weights).sum(1), (sums[:, len(first) :] * others).sum(1)))
    every = np.concatenate(drawn)
    low, high = np.nanquantile(every, [0.025, 0.975]) if np.isfinite(every).any() else (np.nan, np.nan)
    estimate = _quotient(first.mean(0).sum(), second.mean(0).sum())
    return Difference(float(estimate), float(low), float(high), resamples)


def _quotient(ours: Any, theirs: Any) -> Any:
    """Less one; nan where there is nothing to compare with."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(theirs > 0, ours / theirs - 1, np.nan)
