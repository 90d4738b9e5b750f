"""What became of a candidate: word errors, parameters, cost and provenance; written and read whole or not at all."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prunesearch.study.candidate import Candidate
from prunesearch.study.files import write_atomically as write_atomically  # importable from here, too

SCHEMA_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WordErrors(_Frozen):
    """Corpus counts. Corpus-level `wer` is a fraction: all errors over all reference words."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_words: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        return self.errors / max(1, self.reference_words)

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(**{name: getattr(self, name) + getattr(other, name) for name in WordErrors.model_fields})


class UtteranceResult(_Frozen):
    """One decoded utterance, after normalisation."""

    id: str
    reference: str
    hypothesis: str
    errors: WordErrors
    language: str | None = None
    group: str | None = None
    looped: bool = False


class SplitResult(_Frozen):
    """A decoded split: the counts, by language and by group of speakers too, and how often the LLM looped or said nothing
    (fractions)."""

    errors: WordErrors
    utterances: int
    by_language: dict[str, WordErrors] = {}
    by_group: dict[str, WordErrors] = {}
    loop_rate: float = 0.0
    empty_rate: float = 0.0

    @classmethod
    def of(cls, results: Sequence[UtteranceResult]) -> "SplitResult":
        count = max(1, len(results))
        return cls(
            errors=sum((r.errors for r in results), WordErrors()),
            utterances=len(results),
            by_language=_summed((r.language, r.errors) for r in results),
            by_group=_summed((r.group, r.errors) for r in results),
            loop_rate=sum(r.looped for r in results) / count,
            empty_rate=sum(not r.hypothesis for r in results) / count,
        )

    @classmethod
    def pooled(cls, results: Sequence["SplitResult"]) -> "SplitResult":
        """Several decodings of one split as one: counts added up, rates averaged."""
        return cls(
            errors=sum((r.errors for r in results), WordErrors()),
            utterances=sum(r.utterances for r in results),
            by_language=_summed(pair for r in results for pair in r.by_language.items()),
            by_group=_summed(pair for r in results for pair in r.by_group.items()),
            loop_rate=sum(r.loop_rate for r in results) / len(results),
            empty_rate=sum(r.empty_rate for r in results) / len(results),
        )

    @property
    def worst_group(self) -> str | None:
        """The group of highest WER; None where there are no groups."""
        return max(self.by_group, key=lambda group: self.by_group[group].wer, default=None)

    @property
    def worst_group_wer(self) -> float | None:
        return self.by_group[self.worst_group].wer if self.worst_group is not None else None

    @property
    def group_gap(self) -> float | None:
        """WER of the worst group less that of the best."""
        wers = [errors.wer for errors in self.by_group.values()]
        return max(wers) - min(wers) if wers else None


def _summed(parts: Iterable[tuple[str | None, WordErrors]]) -> dict[str, WordErrors]:
    """Counts by name, in order; what has no name is left out."""
    sums: dict[str, WordErrors] = {}
    for name, errors in parts:
        if name:
            sums[name] = sums.get(name, WordErrors()) + errors
    return dict(sorted(sums.items()))


class Parameters(_Frozen):
    """Parameter counts by group, of the model as built."""

    encoder: int
    projector: int
    lora: int
    llm: int

    @property
    def speech(self) -> int:
        """What a deployment adds to the LLM that it already has."""
        return self.encoder + self.projector + self.lora

    @property
    def total(self) -> int:
        return self.speech + self.llm

    def of(self, objective: str) -> int:
        """The count an objective names: `encoder_params`, `speech_params` or `total_params`."""
        return int(getattr(self, objective.removesuffix("_params")))


class Rung(_Frozen):
    """Dev errors after a part of the steps."""

    step: int
    errors: WordErrors


class RunCost(_Frozen):
    """Seconds of wall time, bytes at the peak, and how many utterances fitted in memory at once. Never the same twice: left
    out when records are compared."""

    trial_seconds: float = 0.0  # all of it
    train_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0
    micro_batch: int = 0


class RunRecord(_Frozen):
    """One candidate's outcome. `name` is a baseline's name; `dev` is None when the run failed (and the last
    rung's when it was pruned), `test` when not decoded."""

    schema_version: int = SCHEMA_VERSION
    study: str
    name: str | None = None
    encoder_layers: int  # of the unpruned encoder
    removed_layers: tuple[int, ...]
    lora_rank: int
    repeat: int = 0
    seed: int
    state: Literal["complete", "pruned", "failed"]
    reason: str | None = None
    steps: int
    dev: SplitResult | None
    test: SplitResult | None = None
    rungs: tuple[Rung, ...] = ()
    losses: tuple[float, ...] = ()  # training cross-entropy per target token, nats, every tenth step
    parameters: Parameters
    cost: RunCost = RunCost()
    provenance: dict[str, Any] = {}

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.removed_layers, self.lora_rank, self.repeat)

    @property
    def reported(self) -> tuple[Literal["test", "dev"], SplitResult] | None:
        """The split to report, and its result: test where it was decoded, else dev; None where neither was."""
        if self.test is not None:
            return "test", self.test
        return None if self.dev is None else ("dev", self.dev)

    def outcome(self) -> dict[str, Any]:
        """Everything that a second run of the same candidate must reproduce."""
        return self.model_dump(mode="json", exclude={"cost", "provenance"})


def record_folder(records: Path, candidate: Candidate) -> Path:
    return records / candidate.key


def write_record(records: Path, record: RunRecord) -> None:
    """`records/<key>/record.json`, replaced as a whole."""
    path = record_folder(records, record.candidate) / "record.json"
    write_atomically(path, record.model_dump_json(indent=1) + "\n")


def read_record(records: Path, candidate: Candidate) -> RunRecord | None:
    path = record_folder(records, candidate) / "record.json"
    return RunRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def read_records(records: Path) -> list[RunRecord]:
    """All records, by key."""
    paths = sorted(records.glob("*/record.json"))
    return [RunRecord.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def write_utterances(records: Path, candidate: Candidate, split: str, results: Iterable[UtteranceResult]) -> None:
    """`records/<key>/<split>.jsonl`: one utterance a line."""
    lines = (json.dumps(r.model_dump(mode="json"), ensure_ascii=False) for r in results)
    write_atomically(record_folder(records, candidate) / f"{split}.jsonl", "\n".join(lines) + "\n")


def read_utterances(records: Path, candidate: Candidate, split: str) -> list[UtteranceResult] | None:
    """The split's utterances, in the corpus' order; None when it was not decoded."""
    path = record_folder(records, candidate) / f"{split}.jsonl"
    if not path.exists():
        return None
    # not splitlines(): a hypothesis may hold one of Unicode's other line ends
    return [UtteranceResult.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
