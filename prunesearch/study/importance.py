"""What layers are worth before any training: which sets a scan measures, in which order, and what comes out."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prunesearch.study.record import write_atomically

LayerSet = tuple[int, ...]  # removed layers, sorted

SET_CRITERIA = ("delta_loss", "drift", "delta_wer")
LAYER_CRITERIA = ("block_influence", "frobenius_change", "cka_distance")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SetScore(_Frozen):
    """What the anchor's system loses when these layers go and nothing is trained.

    `delta_loss`: nats per token, teacher-forced, against the unpruned encoder. `drift`: ||P(S) - P|| / ||P|| of the
    projector's output. `delta_wer`: a fraction. None where it was not measured.
    """

    removed_layers: LayerSet
    drift: float
    delta_loss: float | None = None
    delta_wer: float | None = None


class LayerScore(_Frozen):
    """What a layer does to its input, in the unpruned encoder; small values say that it does little.

    `block_influence`: 1 - cosine of input and output, mean over positions (ShortGPT, arXiv 2403.03853).
    `frobenius_change`: ||output - input|| / ||input||. `cka_distance`: 1 - linear CKA of output and input (unbiased, by
    batches: arXiv 2010.15327).
    """

    layer: int
    block_influence: float
    frobenius_change: float
    cka_distance: float


class Evaluations(_Frozen):
    """Layers run on a batch: for all sets as one tree, and as one forward pass for each set (counted, not run)."""

    tree: int
    one_by_one: int
    tree_seconds: float | None = None
    one_by_one_seconds: float | None = None  # of a check that ran both


class Scan(_Frozen):
    """A finished scan. `angular[n - 1][l]` is the angular distance of layer l's input and layer l+n-1's output, in units
    of pi (arXiv 2403.17887), for blocks that lie within the removable part of the encoder, from layer `first` on."""

    study: str
    anchor: str  # fingerprint of the projector that it was measured with
    encoder_layers: int
    removable: LayerSet
    utterances: int
    unpruned_loss: float
    unpruned_wer: float | None = None
    sets: tuple[SetScore, ...]
    layers: tuple[LayerScore, ...]
    first: int
    angular: tuple[tuple[float, ...], ...]
    evaluations: Evaluations

    def score(self, criterion: str) -> dict[LayerSet, float]:
        """A set criterion's values, where they were measured."""
        return {s.removed_layers: v for s in self.sets if (v := getattr(s, criterion)) is not None}

    def table(self) -> dict[str, dict[int, float]]:
        """Criterion -> removable layer -> value, of everything that speaks of single layers."""
        columns = {c: {s[0]: v for s, v in self.score(c).items() if len(s) == 1} for c in SET_CRITERIA}
        columns |= {c: {s.layer: getattr(s, c) for s in self.layers if s.layer in self.removable} for c in LAYER_CRITERIA}
        columns["angular_distance"] = {i: self.angular[0][i - self.first] for i in self.removable}
        return {name: values for name, values in columns.items() if values}

    def interactions(self, criterion: str = "delta_loss") -> dict[LayerSet, float]:
        """What a pair costs beyond the sum of its layers: below zero where the one makes up for the other."""
        values = self.score(criterion)
        return {s: v - values[s[:1]] - values[s[1:]] for s, v in values.items() if len(s) == 2}

    def correlations(self) -> dict[tuple[str, str], float]:
        """Spearman's rank correlation between criteria, over single layers."""
        table = self.table()
        return {(a, b): spearman([table[a][i] for i in self.removable], [table[b][i] for i in self.removable])
                for a, b in combinations(table, 2)}  # fmt: skip


def family(removable: Sequence[int], most: int) -> list[LayerSet]:
    """Every set of at most `most` of the removable layers, the empty one first."""
    return [s for k in range(most + 1) for s in combinations(sorted(removable), k)]


def prefixes(sets: Iterable[LayerSet]) -> dict[LayerSet, int]:
    """The nodes of the sets' tree: each beginning of a set, and the last layer at which it must still be alive.

    A beginning lives until its last continuation branches off it; a set itself, until the encoder's end (-1 stands for that).
    """
    alive: dict[LayerSet, int] = {}
    for whole in sets:
        for k, layer in enumerate(whole):
            start = whole[:k]
            if alive.get(start, 0) != -1:
                alive[start] = max(alive.get(start, 0), layer)
        alive[whole] = -1
    return alive


def evaluations(sets: Sequence[LayerSet], first: int, encoder_layers: int) -> Evaluations:
    """How many layers are run when all sets share a tree that starts at layer `first`, and when each is run by itself."""
    tree = 0
    for node, until in prefixes(sets).items():
        begin = node[-1] + 1 if node else first
        tree += (encoder_layers if until == -1 else until) - begin
    return Evaluations(tree=tree, one_by_one=sum(encoder_layers - first - len(s) for s in sets))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank. NaN where one side is constant or there are fewer than two values."""
    ranks = [_ranks(values) for values in (a, b)]
    means = [sum(r) / len(r) if r else 0.0 for r in ranks]
    x, y = ([v - m for v in r] for r, m in zip(ranks, means, strict=True))
    norm = math.sqrt(sum(v * v for v in x) * sum(v * v for v in y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / norm if norm else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b. NaN where one side is constant or there are fewer than two values."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic) if len(a) > 1 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for k in order[i : j + 1]:
            ranks[k] = (i + j) / 2
        i = j + 1
    return ranks


def write_scan(path: Path, scan: Scan) -> None:
    write_atomically(path, scan.model_dump_json(indent=1) + "\n")


def read_scan(path: Path) -> Scan | None:
    return Scan.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
