"""How important layers are before any training: the layer sets that a scan measures, in which order, and its outcome."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from prunesearch.study.errors import StudyError
from prunesearch.study.files import read_json, write_atomically

LayerSet = tuple[int, ...]  # removed layers, sorted

SET_CRITERIA = ("repaired_loss", "residual", "delta_loss", "drift", "delta_wer")
LAYER_CRITERIA = ("block_influence", "frobenius_change", "cka_distance")

_AGAIN = "`prunesearch scan` writes it again"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SetScore(_Frozen):
    """How much the anchor's system gets worse when these layers are removed and nothing is trained.

    `repaired_loss`: nats per token after the study's closed-form repair, teacher-forced, minus those of the unpruned encoder.
    `residual`: what the repair leaves in the output of the projector's first map: squared error per row, on held-out speech.
    `delta_loss`: as `repaired_loss`, without a repair. `drift`: ||P(S) - P|| / ||P||, where P is the projector's output with
    the unpruned encoder and P(S) without these layers, not repaired. `delta_wer`: a fraction. None: not measured.
    """

    removed_layers: LayerSet
    repaired_loss: float | None = None
    residual: float | None = None
    drift: float | None = None
    delta_loss: float | None = None
    delta_wer: float | None = None


class LayerScore(_Frozen):
    """How much a layer of the unpruned encoder changes its input; a small value means that it changes little.

    `block_influence`: 1 - cosine of input and output, mean over positions (ShortGPT, arXiv 2403.03853).
    `frobenius_change`: ||output - input|| / ||input||. `cka_distance`: 1 - linear CKA of output and input (unbiased, by
    batches: arXiv 2010.15327).
    """

    layer: int
    block_influence: float
    frobenius_change: float
    cka_distance: float


class Evaluations(_Frozen):
    """Number of layer evaluations on one batch: all sets as one tree, and one forward pass per set (counted, not run)."""

    tree: int
    one_by_one: int
    tree_seconds: float | None = None
    one_by_one_seconds: float | None = None  # both times are known only if the scan ran both ways (`--check`)


class Scan(_Frozen):
    """A finished scan.

    `angular[n - 1][i]` is for the block of n layers that starts at layer `first + i`, where `first` is the first removable
    layer: the angular distance between the block's input and its output, in units of pi (arXiv 2403.17887).
    """

    study: str
    anchor: str  # fingerprint of the projector that the scan used
    encoder_layers: int
    removable: LayerSet
    utterances: int
    unpruned_loss: float
    unpruned_wer: float | None = None
    screening_seconds: float = 0.0  # of the repaired losses
    screening_unpruned_loss: float | None = None  # on the utterances of the repaired losses
    sets: tuple[SetScore, ...]
    layers: tuple[LayerScore, ...]
    first: int
    angular: tuple[tuple[float, ...], ...]
    evaluations: Evaluations

    @model_validator(mode="after")
    def _check_layers(self) -> "Scan":
        """Every removable layer must have its values."""
        measured = {score.layer for score in self.layers}
        blocks = len(self.angular[0]) if self.angular else 0
        for layer in self.removable:
            if layer not in measured or not 0 <= layer - self.first < blocks:
                raise ValueError(f"layers and angular must have values of every removable layer, got none of layer {layer}")
        return self

    @property
    def criterion(self) -> str:
        """The criterion that a search uses: the loss after the repair, where the study repairs."""
        return "repaired_loss" if self.score("repaired_loss") else "delta_loss"

    def score(self, criterion: str) -> dict[LayerSet, float]:
        """A set criterion's measured values, by layer set."""
        return {s.removed_layers: v for s in self.sets if (v := getattr(s, criterion)) is not None}

    def increases(self) -> dict[LayerSet, float]:
        """What each measured set adds to the loss, by the criterion that a search uses; `()` has the unpruned loss."""
        unpruned = self.unpruned_loss if self.criterion == "delta_loss" else self.screening_unpruned_loss
        return self.score(self.criterion) | ({} if unpruned is None else {(): unpruned})

    def table(self) -> dict[str, dict[int, float]]:
        """Criterion -> removable layer -> value, for all criteria that have values of single layers."""
        columns = {c: {s[0]: v for s, v in self.score(c).items() if len(s) == 1} for c in SET_CRITERIA}
        columns |= {c: {s.layer: getattr(s, c) for s in self.layers if s.layer in self.removable} for c in LAYER_CRITERIA}
        columns["angular_distance"] = {i: self.angular[0][i - self.first] for i in self.removable}
        return {name: values for name, values in columns.items() if values}

    def interactions(self, criterion: str = "delta_loss") -> dict[LayerSet, float]:
        """Each pair's value minus the sum of its two layers' values. Negative: removing both is less harmful than their sum."""
        return pair_interactions(self.score(criterion))

    def correlations(self) -> dict[tuple[str, str], float]:
        """Spearman's rank correlation of each two criteria, over single layers."""
        table = self.table()
        return {(a, b): spearman([table[a][i] for i in self.removable], [table[b][i] for i in self.removable])
                for a, b in combinations(table, 2)}  # fmt: skip


def pair_interactions(values: Mapping[LayerSet, float]) -> dict[LayerSet, float]:
    """Each measured pair's value minus the sum of its two layers' values; a layer that was not measured counts as 0."""
    return {s: v - values.get(s[:1], 0.0) - values.get(s[1:], 0.0) for s, v in values.items() if len(s) == 2}


def family(removable: Sequence[int], most: int) -> list[LayerSet]:
    """All sets of at most `most` removable layers, the empty set first."""
    return [s for k in range(most + 1) for s in combinations(sorted(removable), k)]


def prefixes(sets: Iterable[LayerSet]) -> dict[LayerSet, int]:
    """The nodes of the tree that the sets share: each prefix of a set, and up to which layer its states are needed.

    A prefix that is not a set itself is needed up to the last layer at which another node branches off it. A set is needed up
    to the end of the encoder, which is written as -1.
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
    """Count the layer evaluations per batch: all sets as one tree that starts at layer `first`, and one pass per set."""
    tree = 0
    for node, until in prefixes(sets).items():
        begin = node[-1] + 1 if node else first
        tree += (encoder_layers if until == -1 else until) - begin
    return Evaluations(tree=tree, one_by_one=sum(encoder_layers - first - len(s) for s in sets))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties get their mean rank. NaN if one side is constant or has fewer than two values."""
    from scipy.stats import spearmanr

    return math.nan if _is_constant(a) or _is_constant(b) else float(spearmanr(a, b).statistic)


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b. NaN if one side is constant or has fewer than two values."""
    from scipy.stats import kendalltau

    return math.nan if _is_constant(a) or _is_constant(b) else float(kendalltau(a, b).statistic)


def _is_constant(values: Sequence[float]) -> bool:
    return len(set(values)) < 2


def write_scan(path: Path, scan: Scan) -> None:
    """Write the scan as JSON, or replace the file as a whole."""
    write_atomically(path, scan.model_dump_json(indent=1) + "\n")


def read_scan(path: Path, study: str | None = None) -> Scan | None:
    """Read a scan's file; None if there is none. Raises StudyError for a damaged file, and for a scan of another study.

    study: the name of the study that the scan must belong to. Default: any.
    """
    if not path.exists():
        return None
    scan = read_json(path, Scan, f"restore it from a copy, or delete it: {_AGAIN}")
    if study not in (None, scan.study):
        raise StudyError([f"{path}: the scan belongs to the study {scan.study}, this study is {study}: delete it: {_AGAIN}"])
    return scan
