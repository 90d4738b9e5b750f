"""Compare a study's records: which systems are on the front, how they differ from the baselines, and how certain that is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunesearch.report.decodings import DecodedPair, Decodings, Split
from prunesearch.report.error_analysis import (
    ErrorAnalysis,
    ErrorChange,
    analyse_errors,
    error_changes,
    unpruned_counterpart,
    without_lora,
)
from prunesearch.report.paper_claims import LORA_CONTRASTS, PAPER_CONTRASTS, PaperClaim, SystemNames, check_paper_claims
from prunesearch.report.published import PublishedPoint, published_points
from prunesearch.report.statistics import Difference
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.front import (
    Point,
    beats,
    dev_wer,
    hypervolume,
    knee,
    pareto_front,
    pooled_by_system,
    within_group_limit,
)
from prunesearch.study.importance import Scan
from prunesearch.study.measurement import Measurement
from prunesearch.study.record import Parameters, RunRecord, read_records


@dataclass(frozen=True)
class Contrast:
    """The WER of `system` minus that of `reference`, on the utterances of `split`.

    `split` and `difference` are None if there is no split that both were decoded on.
    """

    system: RunRecord
    reference: RunRecord
    split: Split | None
    difference: Difference | None


@dataclass(frozen=True)
class Best:
    """The best candidate (on dev) with a certain number of removed layers.

    `tried` counts the candidates with that number of removed layers that are complete or ended at a rung.
    """

    record: RunRecord
    tried: int


@dataclass(frozen=True)
class Reductions:
    """Parameters saved against the unpruned system without LoRA, as fractions. Negative if LoRA adds more than is saved."""

    encoder: float
    speech: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """A study's records, sorted by their part in the comparison. Tuples of records begin with the fewest parameters.

    A baseline is also on the front or one of the others. Records of several trainings of one system are pooled.
    """

    study: str
    trainings: dict[Candidate, int]  # number of complete trainings of each system
    objective: str
    unpruned: Parameters | None  # of the unpruned system without LoRA
    baselines: dict[str, RunRecord]  # complete ones only
    front: tuple[RunRecord, ...]
    others: tuple[RunRecord, ...]  # complete, off the front
    pruned: tuple[RunRecord, ...]  # ended at a rung
    failed: tuple[RunRecord, ...]
    to_beat: str  # the baseline: top2+lora, or top2 in a study without training
    dominating: tuple[Contrast, ...]  # no more parameters than it, lower dev WER
    best_by_removed: dict[int, Best]
    differences: tuple[Contrast, ...]  # between baselines: PAPER_CONTRASTS
    paper_claims: tuple[PaperClaim, ...]
    error_analysis: ErrorAnalysis | None  # of the chosen candidate
    published: tuple[PublishedPoint, ...]
    max_worst_group_wer: float | None
    measured: Measurement | None
    importance: dict[int, float]  # layer -> increase of loss without it, nats per token, before training; empty without a scan
    knee: RunRecord | None
    reference: Point | None  # parameters and WER that bound the hypervolumes
    hypervolumes: dict[str, float]  # of `front`, and of the `baselines` alone; empty without baselines

    @property
    def complete(self) -> tuple[RunRecord, ...]:
        return _by_params((*self.front, *self.others), self.objective)

    @property
    def rate(self) -> str:
        """What the study's error rate is called: see `RunRecord.rate`."""
        return next((r.rate for r in (*self.complete, *self.pruned) if r.dev is not None), "WER")

    @property
    def front_and_baselines(self) -> tuple[RunRecord, ...]:
        """Each record once."""
        wanted = {r.candidate for r in (*self.front, *self.baselines.values())}
        return tuple(r for r in self.complete if r.candidate in wanted)

    @property
    def winner(self) -> Contrast | None:
        """Of the dominating candidates, the one of lowest dev WER. Test results play no part."""
        chosen = _lowest_dev_wer([c.system for c in self.dominating])
        return next((c for c in self.dominating if c.system is chosen), None)

    @property
    def chosen(self) -> RunRecord | None:
        """The winner or, if nothing beats the baseline, the front's knee."""
        return self.winner.system if self.winner else self.knee

    @property
    def lora_changes(self) -> tuple[ErrorChange, ...]:
        """What LoRA changes: front and baselines against the same layers without LoRA."""
        pairs = ((r, without_lora(r, self.complete)) for r in self.front_and_baselines)
        return tuple(change for r, bare in pairs if bare for change in error_changes(r, bare))

    @property
    def pruning_changes(self) -> tuple[ErrorChange, ...]:
        """What removing layers changes: front and baselines against their unpruned counterparts."""
        pairs = ((r, unpruned_counterpart(r, self.complete)) for r in self.front_and_baselines)
        return tuple(change for r, whole in pairs if whole for change in error_changes(r, whole))

    def reductions(self, record: RunRecord) -> Reductions | None:
        """The record's savings against the unpruned system; None while that system's size is unknown."""
        if self.unpruned is None:
            return None
        groups = ("encoder", "speech", "total")
        return Reductions(*(1 - getattr(record.parameters, g) / max(1, getattr(self.unpruned, g)) for g in groups))


def compare(
    records_folder: Path,
    objective: str,
    study_name: str,
    scan: Scan | None = None,
    max_worst_group_wer: float | None = None,
    measured: Measurement | None = None,
) -> Comparison:
    """Compare a study's records, even if the study is not finished.

    Candidates are chosen on dev. Differences are computed on test if both systems were decoded there, else on dev. `scan` gives
    each layer's importance before training, `measured` the systems' speed and size. A candidate whose worst group's dev WER
    exceeds `max_worst_group_wer` (a fraction) is neither on the front nor chosen.

    Raises StudyError if two records to be compared were decoded on different utterances.
    """
    records = read_records(records_folder)
    systems = pooled_by_system(records)
    trainings = _complete_trainings(records)
    decodings = Decodings(records_folder, trainings, {r.candidate: r for r in records})
    complete, pruned, failed = (_in_state(state, systems, objective) for state in ("complete", "pruned", "failed"))
    front = tuple(pareto_front(systems, objective, max_worst_group_wer))
    on_front = {r.candidate for r in front}
    named = {r.name: r for r in complete}
    baselines = {name: named[name] for name in BASELINE_NAMES if name in named}
    to_beat_name = "top2" if systems and not any(r.steps for r in systems) else "top2+lora"
    to_beat = baselines.get(to_beat_name)
    beating = [r for r in complete if to_beat and within_group_limit(r, max_worst_group_wer) and beats(r, to_beat, objective)]
    best_value = knee(front, objective) if front else None
    chosen = _lowest_dev_wer(beating) or best_value
    reference = _reference_point(baselines.values(), objective)
    return Comparison(
        study=study_name,
        trainings={system: len(several) for system, several in trainings.items()},
        objective=objective,
        unpruned=next((r.parameters.model_copy(update={"lora": 0}) for r in systems if not r.removed_layers), None),
        baselines=baselines,
        front=front,
        others=tuple(r for r in complete if r.candidate not in on_front),
        pruned=pruned,
        failed=failed,
        to_beat=to_beat_name,
        dominating=tuple(_contrast(r, to_beat, decodings) for r in beating if to_beat),
        best_by_removed=_best_by_removed(complete, pruned),
        differences=tuple(
            _contrast(baselines[system], baselines[other], decodings)
            for system, other in PAPER_CONTRASTS
            if system in baselines and other in baselines
        ),
        paper_claims=tuple(_paper_claims(baselines, decodings)),
        error_analysis=_error_analysis(chosen, complete, decodings) if chosen else None,
        published=published_points(systems, objective),
        max_worst_group_wer=max_worst_group_wer,
        measured=measured,
        importance=scan.table().get(scan.criterion, {}) if scan else {},
        knee=best_value,
        reference=reference,
        hypervolumes=_hypervolumes(front, baselines.values(), objective, reference) if reference else {},
    )


def _complete_trainings(records: Iterable[RunRecord]) -> dict[Candidate, list[Candidate]]:
    """Each system's complete trainings, by repeat."""
    trainings: dict[Candidate, list[Candidate]] = {}
    for record in sorted(records, key=lambda r: r.repeat):
        if record.state == "complete":
            trainings.setdefault(record.candidate.system, []).append(record.candidate)
    return trainings


def _in_state(state: str, records: Iterable[RunRecord], objective: str) -> tuple[RunRecord, ...]:
    return _by_params((r for r in records if r.state == state), objective)


def _by_params(records: Iterable[RunRecord], objective: str) -> tuple[RunRecord, ...]:
    return tuple(sorted(records, key=lambda r: (r.parameters.of(objective), r.candidate.key)))


def _lowest_dev_wer(records: Iterable[RunRecord]) -> RunRecord | None:
    return min(records, key=lambda r: (dev_wer(r), r.parameters.speech), default=None)


def _best_by_removed(complete: Sequence[RunRecord], pruned: Sequence[RunRecord]) -> dict[int, Best]:
    best: dict[int, Best] = {}
    for count in sorted({len(r.removed_layers) for r in complete}):
        finished, stopped = ([r for r in some if len(r.removed_layers) == count] for some in (complete, pruned))
        best[count] = Best(min(finished, key=dev_wer), len(finished) + len(stopped))
    return best


def _contrast(system: RunRecord, reference: RunRecord, decodings: Decodings) -> Contrast:
    pair = decodings.pair(system, reference)
    return Contrast(system, reference, pair.split, pair.difference()) if pair else Contrast(system, reference, None, None)


def _paper_claims(baselines: Mapping[str, RunRecord], decodings: Decodings) -> Iterable[PaperClaim]:
    pairs: dict[SystemNames, DecodedPair] = {}
    for system, reference in (*PAPER_CONTRASTS, *LORA_CONTRASTS):
        if system in baselines and reference in baselines and (pair := decodings.pair(baselines[system], baselines[reference])):
            pairs[system, reference] = pair
    saved = None
    if "top2+lora" in baselines and "unpruned" in baselines:
        saved = 1 - baselines["top2+lora"].parameters.speech / baselines["unpruned"].parameters.speech
    return check_paper_claims(pairs, saved)


def _error_analysis(record: RunRecord, complete: Sequence[RunRecord], decodings: Decodings) -> ErrorAnalysis | None:
    """The first training of the record against that of its unpruned counterpart."""
    if (whole := unpruned_counterpart(record, complete)) is None:
        return None
    pair = decodings.pair(record, whole, first_training=True)
    return analyse_errors(record, whole, pair) if pair else None


def _reference_point(baselines: Iterable[RunRecord], objective: str) -> Point | None:
    """1 % more than the worst baseline in each coordinate, so that baselines at the edge count."""
    points = [(r.parameters.of(objective), dev_wer(r)) for r in baselines]
    return (1.01 * max(p for p, _ in points), 1.01 * max(w for _, w in points)) if points else None


def _hypervolumes(
    front: Iterable[RunRecord], baselines: Iterable[RunRecord], objective: str, reference: Point
) -> dict[str, float]:
    return {
        name: hypervolume(((r.parameters.of(objective), dev_wer(r)) for r in records), reference)
        for name, records in (("front", front), ("baselines", baselines))
    }
