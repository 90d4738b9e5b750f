"""Landscapes whose truth is known: synthetic ones, and tables of trained candidates.

A landscape says what WER a candidate comes out at, and how many parameters it has. Synthetic ones are drawn by seed from
what has been seen on real encoders: single layers whose costs span orders of magnitude (the first and the last are dear),
pairs of both signs, neighbours that together cost a fraction of one of them alone, a price of length for runs, LoRA that
repairs a share of the damage and overfits when its rank is high.
"""

import itertools
import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from prunesearch.candidate import Candidate
from prunesearch.scan import LayerSet, family
from prunesearch.search.space import SearchSpace


@dataclass(frozen=True)
class Landscape:
    """What is true. `scan` is what a scan would have measured: a noisy relative of the truth."""

    name: str
    space: SearchSpace
    wer: Mapping[str, float]  # by the system's key: everything that can be asked
    params: Mapping[str, float]
    scan: Mapping[LayerSet, float] | None = None
    rungs: Mapping[str, Mapping[int, float]] | None = None  # WER at earlier steps
    steps: int = 0
    noise: float = 0.0  # standard deviation of log WER between two trainings of the same system

    def trained(self, candidate: Candidate) -> float:
        """The WER that a training comes out at; the same whenever it is asked."""
        luck = random.Random(f"{self.name} {candidate.key}").gauss(0, self.noise) if self.noise else 0.0
        return self.wer[candidate.system.key] * math.exp(luck)

    @cached_property
    def true_front(self) -> list[tuple[float, float]]:
        return front((self.params[k], w) for k, w in self.wer.items())

    def on_true_front(self, key: str) -> bool:
        return (self.params[key], self.wer[key]) in self.true_front

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Most parameters, and a tenth above the highest WER of the true front."""
        wers = [w for _, w in self.true_front]
        return max(self.params.values()), max(wers) + 0.1 * (max(wers) - min(wers))

    def share(self, candidates: Iterable[str], log: bool = False) -> float:
        """Of the true front's hypervolume, in WER or in log WER: what the systems are worth that look best, on the mean of
        their trainings."""
        seen: dict[str, list[float]] = {}
        for candidate in map(Candidate.from_key, candidates):
            if candidate.system.key in self.wer:
                seen.setdefault(candidate.system.key, []).append(math.log(max(1e-4, self.trained(candidate))))
        looks = {(self.params[k], statistics.mean(v)): k for k, v in seen.items()}
        found = front((params, self.wer[looks[params, value]]) for params, value in front(looks))
        return hypervolume(found, self.reference, log) / hypervolume(self.true_front, self.reference, log)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The non-dominated (parameters, WER), fewest parameters first."""
    best: list[tuple[float, float]] = []
    for params, wer in sorted(points):
        if not best or wer < best[-1][1]:
            best.append((params, wer))
    return best


def hypervolume(points: list[tuple[float, float]], reference: tuple[float, float], log: bool = False) -> float:
    """The area between a front and the reference; `log`: with the logarithm of WER upwards."""
    height = (lambda wer: math.log(reference[1] / max(wer, 1e-4))) if log else (lambda wer: reference[1] - wer)
    inside = [p for p in points if p[0] <= reference[0] and p[1] < reference[1]]
    ends = [*(p for p, _ in inside[1:]), reference[0]][: len(inside)]
    return sum((end - params) * height(wer) for (params, wer), end in zip(inside, ends, strict=True))


def synthetic(seed: int, layers: int = 12, most: int = 6, ranks: tuple[int, ...] = (0, 4, 16), noise: float = 0.0) -> Landscape:
    """A random encoder."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(0, 1, layers)
    costs = np.exp(rng.normal(-2.6, 0.8, layers) + 1.6 * np.exp(-depth * 8) + 0.7 * np.exp(-(1 - depth) * 6))
    pairs = rng.normal(0, 0.35, (layers, layers)) * np.sqrt(np.outer(costs, costs))
    gap = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    pairs *= np.exp(-(gap - 1) / 4)
    for i in range(layers - 1):  # neighbours do each other's work
        pairs[i, i + 1] -= rng.uniform(0.0, 0.9) * min(costs[i], costs[i + 1])
    long_run = rng.uniform(0.02, 0.08)
    repair, overfit = rng.uniform(0.05, 0.3), rng.uniform(0.0, 0.004)
    base = rng.uniform(0.03, 0.15)

    def damage(removed: LayerSet) -> float:
        total = sum(costs[i] for i in removed) + sum(pairs[i, j] for i, j in itertools.combinations(removed, 2))
        run = max((len(list(g)) for _, g in itertools.groupby(k - i for k, i in enumerate(removed))), default=0)
        return max(total, 0.3 * max((costs[i] for i in removed), default=0.0)) + long_run * max(0, run - 2) ** 2

    sets = family(range(layers), most)
    space = SearchSpace(tuple(range(layers)), most, ranks, {})
    wer, params = {}, {}
    for removed in sets:
        lost = damage(removed)
        for rank in ranks:
            strength = np.log2(1 + rank) / np.log2(17)
            log_wer = np.log(base) + lost * (1 - repair * strength) - 0.03 * strength + overfit * rank
            key = Candidate(removed, rank).key
            wer[key] = float(min(1.2, np.exp(log_wer)))
            params[key] = float(1000 - 40 * len(removed) + 0.5 * rank)
    scan = {s: float(1.5 * damage(s) + rng.normal(0, 0.25) * abs(damage(s))) for s in family(range(layers), 2) if s}
    return Landscape(f"synthetic {seed}", space, wer, params, scan, noise=noise)


def table(path: Path) -> Landscape:
    """An exhaustive table of trained candidates, as `make_table.py` writes it."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = stored["candidates"]
    space = SearchSpace(tuple(stored["removable"]), stored["max_removed"], tuple(stored["ranks"]), {})
    scan = {tuple(map(int, key.split(","))): value for key, value in stored["scan"].items()}
    words = stored["reference_words"]
    return Landscape(
        stored["name"], space,
        wer={key: row["errors"] / words for key, row in rows.items()},
        params={key: float(row["params"]) for key, row in rows.items()},
        scan=scan,
        rungs={key: {int(step): errors / words for step, errors in row["rungs"].items()} for key, row in rows.items()},
        steps=stored["steps"],
    )  # fmt: skip
