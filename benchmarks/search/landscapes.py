"""Landscapes whose truth is known: synthetic ones, and tables of trained candidates.

A landscape says what WER a candidate comes out at, and how many parameters it has. Synthetic ones are drawn by seed from
what has been seen on real encoders: single layers whose costs span orders of magnitude (the first and the last are dear),
pairs of both signs, neighbours that together cost a fraction of one of them alone, a price of length for runs, LoRA that
repairs a share of the damage and overfits when its rank is high; and a screening that ranks sets about as well as it does on
the tables, since training repairs some layers' loss and not others'.
"""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from prunesearch.search.screening_choice import next_to_screen
from prunesearch.search.space import SearchSpace
from prunesearch.search.surrogate import Array
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import LayerSet
from prunesearch.training.importance_scan import screened_by_default


@dataclass(frozen=True)
class Landscape:
    """What is true. `screening` is what screening would measure: a noisy relative of the truth."""

    name: str
    space: SearchSpace
    wer: Callable[[Candidate], float]
    params: Callable[[Candidate], float]
    true_front: list[tuple[float, float]]  # (parameters, WER), fewest parameters first
    screening: "Screening | None" = None
    block_influence: Mapping[LayerSet, float] | None = None  # of single layers
    rungs: Mapping[str, Mapping[int, float]] | None = None  # WER at earlier steps
    steps: int = 0
    noise: float = 0.0  # standard deviation of log WER between two trainings of the same system

    @cached_property
    def screened(self) -> dict[LayerSet, float]:
        """What a scan measures by default; nothing without screening."""
        if self.screening is None:
            return {}
        return self.screening.of_sets(self.space, screened_by_default(len(self.space.removable)))

    def trained(self, candidate: Candidate) -> float:
        """The WER that a training comes out at; the same whenever it is asked."""
        luck = random.Random(f"{self.name} {candidate.key}").gauss(0, self.noise) if self.noise else 0.0
        return self.wer(candidate.system) * math.exp(luck)

    def on_true_front(self, candidate: Candidate) -> bool:
        return (self.params(candidate.system), self.wer(candidate.system)) in self.true_front

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Most parameters (what saves none is worth nothing), and a tenth above the highest WER of the true front."""
        wers = [w for _, w in self.true_front]
        return self.params(Candidate((), max(self.space.ranks))), max(wers) + 0.1 * (max(wers) - min(wers))

    def share(self, candidates: Iterable[str], log: bool = False) -> float:
        """Of the true front's hypervolume, in WER or in log WER: what the systems are worth that look best, on the mean of
        their trainings."""
        seen: dict[Candidate, list[float]] = {}
        for candidate in map(Candidate.from_key, candidates):
            seen.setdefault(candidate.system, []).append(math.log(max(1e-4, self.trained(candidate))))
        looks = {(self.params(c), statistics.mean(v)): c for c, v in seen.items()}
        found = front((params, self.wer(looks[params, value])) for params, value in front(looks))
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


@dataclass(frozen=True)
class Screening:
    """Measures what any set adds to the loss. `price`: of a set, in trainings."""

    increase: Callable[[LayerSet], float]
    unpruned_loss: float
    price: float

    def of_sets(self, space: SearchSpace, most: int) -> dict[LayerSet, float]:
        """The sets that a scan would choose, in the order in which it screens them; `()` has the unpruned loss."""
        known: dict[LayerSet, float] = {}
        while asked := next_to_screen(known, space.removable, space.max_removed, most):
            known |= {s: self.increase(s) if s else self.unpruned_loss for s in asked}
        return known

    def lying(self, how: str) -> "Screening":
        """`random`: values that have nothing to do with the sets; `reversed`: the worse a set, the better it looks."""

        def random_increase(layers: LayerSet) -> float:
            return self.unpruned_loss * random.Random(f"lie {layers}").lognormvariate(0, 1)

        def reversed_increase(layers: LayerSet) -> float:
            return self.unpruned_loss**2 / max(self.increase(layers), 1e-3 * self.unpruned_loss)

        return replace(self, increase=random_increase if how == "random" else reversed_increase)


# of a screening: standard deviations of the errors of a layer's cost and of a set's damage, in logarithms
LAYER_ERROR, SET_ERROR = 0.25, 0.2
LOSS_SLOPE = 1.3  # the loss after the repair grows with WER to this power
PRICE = 0.1  # of a screened set, in trainings
LEAST_SHARE = 0.1  # of what the dearest of a set's layers costs alone: what the set costs at least


@dataclass(frozen=True)
class Effects:
    """What removing layers does to a made-up encoder, drawn by seed."""

    costs: Array  # (L,)
    pairs: Array  # (L, L), of which only what lies above the diagonal is read
    long_run: float
    repair: float
    overfit: float
    base: float

    @classmethod
    def drawn(cls, rng: np.random.Generator, layers: int) -> "Effects":
        depth = np.linspace(0, 1, layers)
        costs = np.exp(rng.normal(-2.6, 0.8, layers) + 1.6 * np.exp(-depth * 8) + 0.7 * np.exp(-(1 - depth) * 6))
        pairs = rng.normal(0, 0.35, (layers, layers)) * np.sqrt(np.outer(costs, costs))
        gap = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
        pairs *= np.exp(-(gap - 1) / 4)
        for i in range(layers - 1):  # neighbours do each other's work, or one makes no sense without the other
            pairs[i, i + 1] -= rng.uniform(0.0, 0.9) * min(costs[i], costs[i + 1])
            if rng.random() < 0.2:
                pairs[i, i + 1] = rng.uniform(0.1, 0.5) * max(costs[i], costs[i + 1]) - costs[i] - costs[i + 1]
        long_run = rng.uniform(0.02, 0.08)
        repair, overfit = rng.uniform(0.05, 0.3), rng.uniform(0.0, 0.004)
        return cls(costs, pairs, long_run, repair, overfit, base=rng.uniform(0.03, 0.15))

    def damage(self, removed: LayerSet) -> float:
        total = sum(self.costs[i] for i in removed) + sum(self.pairs[i, j] for i, j in itertools.combinations(removed, 2))
        run = max((len(list(g)) for _, g in itertools.groupby(k - i for k, i in enumerate(removed))), default=0)
        return (
            max(total, LEAST_SHARE * max((self.costs[i] for i in removed), default=0.0)) + self.long_run * max(0, run - 2) ** 2
        )

    def wer(self, candidate: Candidate) -> float:
        lost, rank = self.damage(candidate.removed_layers), candidate.lora_rank
        strength = np.log2(1 + rank) / np.log2(17)
        log_wer = np.log(self.base) + lost * (1 - self.repair * strength) - 0.03 * strength + self.overfit * rank
        return float(min(1.2, np.exp(log_wer)))

    def screening(self, rng: np.random.Generator) -> Screening:
        """What is left after the repair: layers that training would repair look worse than they are, others better."""
        seen = np.exp(rng.normal(0, LAYER_ERROR, len(self.costs)))
        untrained = replace(self, costs=seen * self.costs, pairs=np.sqrt(np.outer(seen, seen)) * self.pairs)
        seed = int(rng.integers(2**31))

        def increase(layers: LayerSet) -> float:
            error = random.Random(f"{seed} {layers}").gauss(0, SET_ERROR)
            return float(np.expm1(LOSS_SLOPE * untrained.damage(layers) * np.exp(error)))

        return Screening(increase, 1.0, PRICE)

    def mildest(self, most: int) -> list[LayerSet]:
        """The set of each size up to `most` that does least damage, of all there are. A set is a number, one bit a layer:
        what is true of the first so many layers is extended by the next one, for all of their subsets at once. Raises
        ValueError beyond 25 layers, which would take 2 GB."""
        if len(self.costs) > 25:
            raise ValueError(f"at most 25 layers can be looked through, got {len(self.costs)}")
        total, dearest, size = np.zeros(1), np.zeros(1), np.zeros(1, np.int8)
        longest, ending = np.zeros(1, np.int8), np.zeros(1, np.int8)  # runs; the one that ends with the last layer
        for layer in range(len(self.costs)):
            with_others = np.zeros(1)
            for other in range(layer):
                with_others = np.append(with_others, with_others + self.pairs[other, layer])
            total = np.append(total, total + with_others + self.costs[layer])
            dearest = np.append(dearest, np.maximum(dearest, self.costs[layer]))
            size = np.append(size, size + 1)
            longest = np.append(longest, np.maximum(longest, ending + 1))
            ending = np.append(np.zeros_like(ending), ending + 1)
        damage = np.maximum(total, LEAST_SHARE * dearest) + self.long_run * np.maximum(0, longest - 2.0) ** 2
        best = (int(np.where(size == n, damage, np.inf).argmin()) for n in range(most + 1))
        return [tuple(i for i in range(len(self.costs)) if number >> i & 1) for number in best]


def synthetic(seed: int, layers: int = 12, most: int = 6, ranks: tuple[int, ...] = (0, 4, 16), noise: float = 0.0) -> Landscape:
    """A random encoder."""
    rng = np.random.default_rng(seed)
    effects = Effects.drawn(rng, layers)

    def params(candidate: Candidate) -> float:
        return 1000 - 480 / layers * len(candidate.removed_layers) + 0.5 * candidate.lora_rank

    # of the same size and rank, who does less damage errs less
    best = [Candidate(removed, rank) for removed in effects.mildest(most) for rank in ranks]
    return Landscape(
        f"synthetic {seed}", SearchSpace(tuple(range(layers)), most, ranks, {}), cache(effects.wer), params,
        true_front=front((params(c), effects.wer(c)) for c in best),
        screening=effects.screening(rng), noise=noise,
    )  # fmt: skip


def table(path: Path) -> Landscape | None:
    """An exhaustive table of trained candidates, as `make_table.py` writes it; None where some are missing."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = stored["candidates"]
    # a table that was made without a repair has losses without a repair
    losses = {tuple(map(int, key.split(","))): loss for key, loss in stored.get("screened_loss", stored["scan"]).items()}
    space = SearchSpace(tuple(stored["removable"]), stored["max_removed"], tuple(stored["ranks"]), {})
    if len(rows) < space.size:
        return None
    words = stored["reference_words"]
    wer = {key: row["errors"] / words for key, row in rows.items()}
    rungs = {key: {int(step): errors for step, errors in row["rungs"].items() if int(step)} for key, row in rows.items()}
    price = stored["seconds_a_set"] / stored["seconds_a_training"] if "seconds_a_set" in stored else 0.0
    params = {key: float(row["params"]) for key, row in rows.items()}
    return Landscape(
        stored["name"], space, lambda c: wer[c.key], lambda c: params[c.key],
        true_front=front((params[key], wer[key]) for key in rows),
        screening=Screening(losses.__getitem__, stored.get("unpruned_loss", 0.0), price),
        block_influence={(int(layer),): value for layer, value in stored["criteria"]["block_influence"].items()},
        rungs={key: {step: errors / words for step, errors in of_key.items()} for key, of_key in rungs.items()},
        steps=stored["steps"],
    )  # fmt: skip
