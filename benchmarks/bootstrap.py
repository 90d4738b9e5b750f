"""Time of the paired bootstrap on a large corpus, and its interval, compared with a plain implementation.

    python benchmarks/bootstrap.py [--utterances 16391] [--resamples 10000] [--trainings 3] [--runs 3]

The corpus is simulated. It has the size of the English test split of Common Voice 22: 16,391 utterances, nine words on average,
one word in seven wrong. The second system differs from the first one in some of the utterances. The plain implementation draws
one resample after the other. The two run alternately in one process. For one training of each system and for several, the
benchmark prints the median time of each implementation and both intervals.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunesearch.report.statistics import paired_bootstrap

Counts = NDArray[np.int64]
Interval = tuple[float, float]  # the 95 % interval of the difference in WER, fractions


@dataclass(frozen=True)
class Corpus:
    """Word errors of two systems, each (trainings, utterances), and the number of reference words, (utterances,)."""

    first: Counts
    second: Counts
    words: Counts


def simulated(utterances: int, trainings: int) -> Corpus:
    rng = np.random.default_rng(0)
    words = 1 + rng.poisson(8, utterances)
    first = rng.binomial(words, 0.15, (trainings, utterances))
    second = np.maximum(0, first + rng.choice([-1, 0, 1], (trainings, utterances), p=[0.06, 0.86, 0.08]))
    return Corpus(first, second, words)


def ours(corpus: Corpus, resamples: int) -> Interval:
    found = paired_bootstrap(corpus.first, corpus.second, corpus.words, resamples)
    return found.low, found.high


def plain(corpus: Corpus, resamples: int) -> Interval:
    """The definition: each resample draws utterances, and one training for each draw."""
    rng = np.random.default_rng(1)
    first, second, words = corpus.first, corpus.second, corpus.words
    differences = []
    for _ in range(resamples):
        rows = rng.integers(0, len(words), len(words))
        seeds = rng.integers(0, len(first), len(first))
        one, other = (errors[seeds][:, rows].sum() / len(first) for errors in (first, second))
        differences.append((one - other) / words[rows].sum())
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


IMPLEMENTATIONS = {"ours": ours, "plain": plain}


def compare(corpus: Corpus, resamples: int, runs: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    intervals: dict[str, Interval] = {}
    for _ in range(runs):
        for name, implementation in IMPLEMENTATIONS.items():
            begin = time.perf_counter()
            intervals[name] = implementation(corpus, resamples)
            seconds[name].append(time.perf_counter() - begin)
    trainings, utterances = corpus.first.shape
    print(f"{utterances} utterances, {resamples} resamples, {trainings} training(s) of each system")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, (low, high) in intervals.items():
        print(f"  {name:6} {medians[name]:7.2f} s   95 % interval {100 * low:+.3f} to {100 * high:+.3f} points")
    print(f"  ratio {medians['ours'] / medians['plain']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=16_391)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--trainings", type=int, default=3, help="trainings of each system, besides the case of one")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each implementation")
    a = parser.parse_args()
    for trainings in sorted({1, a.trainings}):
        compare(simulated(a.utterances, trainings), a.resamples, a.runs)
