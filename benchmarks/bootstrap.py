"""How long a paired bootstrap takes on a large corpus, against a plain one, and how far the two are apart.

    python benchmarks/bootstrap.py [--utterances 16391] [--resamples 10000] [--trainings 3] [--turns 3]

The corpus is made up: 16,391 utterances is Common Voice 22's English test split, of nine words on average, a seventh of them
wrong; the second system differs from the first in some. The plain way draws utterances one resample after the other. Both
take turns in one process; printed are medians, and both intervals, for one training of each system and for several.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prunesearch.report.statistics import paired_bootstrap

Counts = NDArray[np.int64]


def corpus(utterances: int, trainings: int) -> tuple[Counts, Counts, Counts]:
    """Errors of two systems, (trainings, utterances) each, and reference words."""
    rng = np.random.default_rng(0)
    words = 1 + rng.poisson(8, utterances)
    first = rng.binomial(words, 0.15, (trainings, utterances))
    second = np.maximum(0, first + rng.choice([-1, 0, 1], (trainings, utterances), p=[0.06, 0.86, 0.08]))
    return first, second, words


def plain(first: Counts, second: Counts, words: Counts, resamples: int) -> tuple[float, float]:
    """The definition, one resample at a time."""
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(0, len(words), len(words))
        seeds = rng.integers(0, len(first), len(first))
        ours, theirs = (errors[seeds][:, rows].sum() / len(first) for errors in (first, second))
        drawn.append((ours - theirs) / words[rows].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def timed(work: Callable[[], tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def compared(utterances: int, resamples: int, trainings: int, turns: int) -> None:
    first, second, words = corpus(utterances, trainings)

    def ours() -> tuple[float, float]:
        found = paired_bootstrap(first, second, words, resamples)
        return found.low, found.high

    sides = {"ours": ours, "plain": lambda: plain(first, second, words, resamples)}
    runs = {name: [] for name in sides}
    for _ in range(turns):
        for name, work in sides.items():
            runs[name].append(timed(work))
    print(f"{utterances} utterances, {resamples} resamples, {trainings} training(s) of each system")
    medians = {name: statistics.median(seconds for seconds, _ in of) for name, of in runs.items()}
    for name, of in runs.items():
        low, high = of[0][1]
        print(f"  {name:6} {medians[name]:7.2f} s   95 % interval {100 * low:+.3f} to {100 * high:+.3f} points")
    print(f"  ratio {medians['ours'] / medians['plain']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=16_391)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    a = parser.parse_args()
    for trainings in sorted({1, a.trainings}):
        compared(a.utterances, a.resamples, trainings, a.turns)
