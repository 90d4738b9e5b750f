"""Everything a report says, computed from a study's records: the front, the baselines, and what lies between them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from prunesearch.report.anatomy import Anatomy, Change, anatomy, changes, counterpart, without_lora
from prunesearch.report.paper_claims import Decoded, Finding, findings
from prunesearch.report.published import Mark, marks
from prunesearch.report.statistics import Counts, Difference, paired_bootstrap
from prunesearch.study.candidate import BASELINE_NAMES, Candidate
from prunesearch.study.front import dev_wer, hypervolume, knee, pareto_front, pooled_by_system, within
from prunesearch.study.importance import Scan
from prunesearch.study.measurement import Measurement
from prunesearch.study.record import Parameters, RunRecord, UtteranceResult, read_records, read_utterances

Split = Literal["test", "dev"]

# What the published comparison claims, and the last one the control that it lacked: LoRA on both sides.
CLAIMS = (("top2", "unpruned"), ("top2+lora", "unpruned"), ("top2+lora", "unpruned+lora"))
TO_BEAT = "top2+lora"


@dataclass(frozen=True)
class Contrast:
    """`system`'s WER less that of `reference`, on the utterances of `split`; None where either lacks them."""

    system: RunRecord
    reference: RunRecord
    split: Split | None
    difference: Difference | None


@dataclass(frozen=True)
class Best:
    """The best of the `tried` candidates (complete or ended at a rung) that lost the same number of layers."""

    record: RunRecord
    tried: int


@dataclass(frozen=True)
class Reductions:
    """Parameters saved against the unpruned system without LoRA, as fractions; negative where LoRA adds more."""

    encoder: float
    speech: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """A study's records, sorted by the part they play. Baselines also take their place on or off the front."""

    study: str
    trainings: dict[Candidate, int]  # complete ones, by system
    objective: str
    unpruned: Parameters | None  # of the whole system without LoRA
    baselines: dict[str, RunRecord]  # complete ones only
    front: tuple[RunRecord, ...]  # fewest parameters first, as all tuples here
    others: tuple[RunRecord, ...]  # complete, off the front
    pruned: tuple[RunRecord, ...]
    failed: tuple[RunRecord, ...]
    dominating: tuple[Contrast, ...]  # on the front, no more parameters than top2+lora, lower dev WER
    best_by_removed: dict[int, Best]
    differences: tuple[Contrast, ...]
    claims: tuple[Finding, ...]
    repairs: tuple[Change, ...]  # what LoRA changes, at the same layers: front and baselines
    losses: tuple[Change, ...]  # front and baselines against their unpruned counterparts
    anatomy: Anatomy | None  # of the candidate that dev chooses
    published: tuple[Mark, ...]
    max_worst_group_wer: float | None
    measured: Measurement | None
    importance: dict[int, float]  # layer -> what it costs alone, before any training: nats per token; empty without a scan
    knee: RunRecord | None
    reference: tuple[float, float] | None  # parameters and WER, up to which hypervolumes are counted
    hypervolumes: dict[str, float]  # of the front, and of the baselines alone

    @property
    def complete(self) -> tuple[RunRecord, ...]:
        return _by_params((*self.front, *self.others), self.objective)

    @property
    def winner(self) -> Contrast | None:
        """The dominating record that dev chooses; test is not asked."""
        return min(self.dominating, key=lambda c: (dev_wer(c.system), c.system.parameters.speech), default=None)

    def reductions(self, record: RunRecord) -> Reductions | None:
        """None while the unpruned system's size is unknown."""
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
    """Compare a study's records, as many as there are. Selection looks at dev; differences at test where it is decoded.

    A `scan` tells what each layer is worth before any training, `measured` what systems take. A candidate whose worst group has
    a dev WER above the limit is neither on the front nor chosen.

    Raises ValueError when two records to be compared were decoded on different utterances.
    """
    trained = read_records(records_folder)
    records = pooled_by_system(trained)
    front = pareto_front(records, objective, max_worst_group_wer)
    on_front = {r.candidate for r in front}
    trainings: dict[Candidate, list[Candidate]] = {}
    for record in sorted(trained, key=lambda r: r.repeat):
        if record.state == "complete":
            trainings.setdefault(record.candidate.system, []).append(record.candidate)
    complete, pruned, failed = (_in_state(state, records, objective) for state in ("complete", "pruned", "failed"))
    named = {r.name: r for r in complete}
    baselines = {name: named[name] for name in BASELINE_NAMES if name in named}
    to_beat = baselines.get(TO_BEAT)
    shown = _by_params({r.candidate: r for r in (*front, *baselines.values())}.values(), objective)
    best_value = knee(front, objective) if front else None
    allowed = [r for r in complete if within(r, max_worst_group_wer)]
    beating = [r for r in allowed if to_beat and _beats(r, to_beat, objective)]
    chosen = min(beating, key=lambda r: (dev_wer(r), r.parameters.speech), default=best_value)
    read: _Reader = functools.cache(lambda system, split: _read_utterances(records_folder, trainings[system], split))
    return Comparison(
        study=study_name,
        trainings={system: len(several) for system, several in trainings.items()},
        objective=objective,
        unpruned=next((r.parameters.model_copy(update={"lora": 0}) for r in records if not r.removed_layers), None),
        baselines=baselines,
        front=tuple(front),
        others=tuple(r for r in complete if r.candidate not in on_front),
        pruned=pruned,
        failed=failed,
        dominating=tuple(_contrast(r, to_beat, read) for r in beating if to_beat),
        best_by_removed=_best_by_removed(complete, pruned),
        differences=tuple(
            _contrast(baselines[system], baselines[reference], read)
            for system, reference in CLAIMS
            if system in baselines and reference in baselines
        ),
        claims=_claims(records_folder, baselines, trainings),
        repairs=tuple(c for r in shown if (bare := without_lora(r, complete)) for c in changes(r, bare)),
        losses=tuple(c for r in shown if (whole := counterpart(r, complete)) for c in changes(r, whole)),
        anatomy=_anatomy(records_folder, chosen, complete, trainings) if chosen else None,
        published=marks(records, objective),
        max_worst_group_wer=max_worst_group_wer,
        measured=measured,
        importance=scan.table().get("delta_loss", {}) if scan else {},
        knee=best_value,
        **_volumes(front, tuple(baselines.values()), objective),
    )


def _claims(
    records_folder: Path, baselines: dict[str, RunRecord], trainings: dict[Candidate, list[Candidate]]
) -> tuple[Finding, ...]:
    """On test where all trainings of both were decoded there, else on dev."""

    def decoded(name: str, split: str) -> list[list[UtteranceResult]] | None:
        read = [read_utterances(records_folder, c, split) for c in trainings[baselines[name].candidate]]
        return [sorted(results, key=lambda r: r.id) for results in read if results] if all(read) else None

    def repeats(name: str) -> list[int]:
        return [c.repeat for c in trainings[baselines[name].candidate]]

    pairs = {}
    for system, reference in (*CLAIMS, ("unpruned+lora", "unpruned"), ("top2+lora", "top2")):
        if system not in baselines or reference not in baselines:
            continue
        for split in ("test", "dev"):
            ours, theirs = decoded(system, split), decoded(reference, split)
            if ours and theirs:
                pairs[system, reference] = Decoded(ours, theirs, repeats(system) == repeats(reference))
                break
    saved = None
    if "top2+lora" in baselines and "unpruned" in baselines:
        saved = 1 - baselines["top2+lora"].parameters.speech / baselines["unpruned"].parameters.speech
    return tuple(findings(pairs, saved))


def _anatomy(
    records_folder: Path, record: RunRecord, complete: Sequence[RunRecord], trainings: dict[Candidate, list[Candidate]]
) -> Anatomy | None:
    """Against its unpruned counterpart, the first training of each, on test where both were decoded there, else on dev."""
    if (whole := counterpart(record, complete)) is None:
        return None
    splits: tuple[Split, ...] = ("test", "dev")
    for split in splits:
        ours, theirs = (read_utterances(records_folder, trainings[r.candidate][0], split) for r in (record, whole))
        if ours and theirs:
            return anatomy(record, whole, split, *(sorted(results, key=lambda u: u.id) for results in (ours, theirs)))
    return None


def _volumes(front: Sequence[RunRecord], baselines: tuple[RunRecord, ...], objective: str) -> dict[str, Any]:
    """The reference is what the worst baseline has, in each coordinate, and a hundredth more: baselines on the edge count."""
    if not baselines:
        return {"reference": None, "hypervolumes": {}}
    reference = (
        1.01 * max(r.parameters.of(objective) for r in baselines),
        1.01 * max(dev_wer(r) for r in baselines),
    )
    alone = pareto_front(baselines, objective)
    volumes = {name: hypervolume(some, objective, reference) for name, some in (("front", front), ("baselines", alone))}
    return {"reference": reference, "hypervolumes": volumes}


def _in_state(state: str, records: list[RunRecord], objective: str) -> tuple[RunRecord, ...]:
    return _by_params((r for r in records if r.state == state), objective)


def _by_params(records: Iterable[RunRecord], objective: str) -> tuple[RunRecord, ...]:
    return tuple(sorted(records, key=lambda r: (r.parameters.of(objective), r.candidate.key)))


def _beats(record: RunRecord, other: RunRecord, objective: str) -> bool:
    return record.parameters.of(objective) <= other.parameters.of(objective) and dev_wer(record) < dev_wer(other)


def _best_by_removed(complete: tuple[RunRecord, ...], pruned: tuple[RunRecord, ...]) -> dict[int, Best]:
    best: dict[int, Best] = {}
    for count in sorted({len(r.removed_layers) for r in complete}):
        finished, stopped = ([r for r in some if len(r.removed_layers) == count] for some in (complete, pruned))
        best[count] = Best(min(finished, key=dev_wer), len(finished) + len(stopped))
    return best


class _Utterances(NamedTuple):
    """Counts of a decoded split, sorted by utterance id: errors (trainings, utterances), reference words (utterances,)."""

    ids: tuple[str, ...]
    repeats: tuple[int, ...]
    errors: Counts
    reference_words: Counts


_Reader = Callable[[Candidate, Split], _Utterances | None]


def _read_utterances(records_folder: Path, trainings: list[Candidate], split: Split) -> _Utterances | None:
    """None unless all trainings were decoded there."""
    decoded = [sorted(read_utterances(records_folder, c, split) or [], key=lambda r: r.id) for c in trainings]
    ids = tuple(r.id for r in decoded[0])
    if not ids or any(tuple(r.id for r in each) != ids for each in decoded):
        return None
    errors = np.array([[r.errors.errors for r in each] for each in decoded], dtype=np.int64)
    words = np.array([r.errors.reference_words for r in decoded[0]], dtype=np.int64)
    return _Utterances(ids, tuple(c.repeat for c in trainings), errors, words)


def _contrast(system: RunRecord, reference: RunRecord, read: _Reader) -> Contrast:
    """On test if both were decoded there, else on dev."""
    splits: tuple[Split, ...] = ("test", "dev")
    for split in splits:
        ours, theirs = read(system.candidate, split), read(reference.candidate, split)
        if ours is None or theirs is None:
            continue
        if ours.ids != theirs.ids or not np.array_equal(ours.reference_words, theirs.reference_words):
            keys = f"{system.candidate.key} and {reference.candidate.key}"
            raise ValueError(f"{keys} were not decoded on the same {split} utterances: evaluate both with one study file")
        alike = ours.repeats == theirs.repeats
        found = paired_bootstrap(ours.errors, theirs.errors, ours.reference_words, by_training=alike)
        return Contrast(system, reference, split, found)
    return Contrast(system, reference, None, None)
