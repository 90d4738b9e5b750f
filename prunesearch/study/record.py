"""The outcome of a candidate: word errors, parameters, cost and provenance, in files that are read whole or refused.

records/<key>/record.json   one RunRecord
records/<key>/dev.jsonl     one UtteranceResult per line; test.jsonl likewise
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically

SCHEMA_VERSION = 1  # of record.json; a reader refuses any other
WEIGHTS_FILE = "weights.safetensors"  # in a record's folder: projector and LoRA
ENCODER_FILE = "encoder.safetensors"  # in a record's folder: the refitted maps of its encoder

TRAIN_AGAIN = (
    "restore it from a copy; or delete its folder: `prunesearch retry` then queues the candidate, and `launch` trains it again"
)
_RESTORE = "restore the file from a copy, or delete it"
_AGAIN = f"{_RESTORE}: `prunesearch retry` then queues the candidate again"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WordErrors(_Frozen):
    """Error counts of an utterance or a corpus. `wer` is a fraction: all errors divided by all reference words; NaN if there
    are none."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_words: int = 0

    @model_validator(mode="before")
    @classmethod
    def _check_complete(cls, data: Any, info: ValidationInfo) -> Any:
        """A count that is missing in a file is not zero: the file was damaged."""
        if info.mode == "json" and isinstance(data, dict) and (missing := cls.model_fields.keys() - data.keys()):
            raise ValueError(f"{min(missing)} is missing")
        return data

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        return self.errors / self.reference_words if self.reference_words else math.nan

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(**{name: getattr(self, name) + getattr(other, name) for name in WordErrors.model_fields})


class CharacterErrors(_Frozen):
    """Characters that were replaced, left out or added, and characters of the reference. Spaces do not count."""

    errors: int = 0
    reference_characters: int = 0

    @property
    def cer(self) -> float:
        """A fraction; NaN if there is no reference."""
        return self.errors / self.reference_characters if self.reference_characters else math.nan

    def __add__(self, other: "CharacterErrors") -> "CharacterErrors":
        return CharacterErrors(
            errors=self.errors + other.errors, reference_characters=self.reference_characters + other.reference_characters
        )


class UtteranceResult(_Frozen):
    """One decoded utterance; both texts are normalised. `looped`: see `speech.wer.is_loop`.

    unit: what `errors` counts; in a language written without spaces, each character counts as a word.
    reached_limit: the hypothesis ended at its token limit. switched: see `speech.language.is_switched`. These and `characters`
    are None in results of versions that did not tell.
    """

    id: str
    reference: str
    hypothesis: str
    errors: WordErrors
    unit: Literal["words", "characters"] = "words"
    characters: CharacterErrors | None = None
    language: str | None = None
    group: str | None = None
    looped: bool = False
    reached_limit: bool | None = None
    switched: bool | None = None


class SplitResult(_Frozen):
    """Error counts of a decoded split: in total, by language, and by group (the column that `data.group` names).

    metric: what `errors.wer` is: a word error rate; a character error rate, if each character counts as a word; or a mixed one,
    if that depends on the language. characters: errors in characters in any case; None if they were not counted.
    loop_rate, empty_rate: fractions of utterances in which the LLM looped, or wrote nothing.
    token_limit_rate: fraction of utterances whose hypothesis ended at its token limit; None if that was not counted.
    switched_rate: fraction of utterances whose hypothesis is in another language, of those whose language is known; None if
    none is.
    """

    errors: WordErrors
    metric: Literal["wer", "cer", "mer"] = "wer"
    characters: CharacterErrors | None = None
    utterances: int
    by_language: dict[str, WordErrors] = {}
    by_group: dict[str, WordErrors] = {}
    loop_rate: float = 0.0
    empty_rate: float = 0.0
    token_limit_rate: float | None = None
    switched_rate: float | None = None

    @classmethod
    def of(cls, results: Sequence[UtteranceResult]) -> "SplitResult":
        """The counts of a split's utterances."""
        count = max(1, len(results))
        units = {r.unit for r in results}
        known = [r.switched for r in results if r.switched is not None]
        return cls(
            errors=sum((r.errors for r in results), WordErrors()),
            metric="mer" if len(units) > 1 else "cer" if units == {"characters"} else "wer",
            characters=_summed_characters([r.characters for r in results]),
            utterances=len(results),
            by_language=_summed((r.language, r.errors) for r in results),
            by_group=_summed((r.group, r.errors) for r in results),
            loop_rate=sum(r.looped for r in results) / count,
            empty_rate=sum(not r.hypothesis for r in results) / count,
            token_limit_rate=_mean([r.reached_limit for r in results]),
            switched_rate=_mean(known),
        )

    @classmethod
    def pooled(cls, results: Sequence["SplitResult"]) -> "SplitResult":
        """Several decodings of one split combined: counts are summed, rates averaged."""
        return cls(
            errors=sum((r.errors for r in results), WordErrors()),
            metric=results[0].metric,
            characters=_summed_characters([r.characters for r in results]),
            utterances=sum(r.utterances for r in results),
            by_language=_summed(pair for r in results for pair in r.by_language.items()),
            by_group=_summed(pair for r in results for pair in r.by_group.items()),
            loop_rate=sum(r.loop_rate for r in results) / len(results),
            empty_rate=sum(r.empty_rate for r in results) / len(results),
            token_limit_rate=_mean([r.token_limit_rate for r in results]),
            switched_rate=_mean([r.switched_rate for r in results]),
        )

    @property
    def worst_group(self) -> str | None:
        """The group with the highest WER; None if there are no groups."""
        return max(self.by_group, key=lambda group: self.by_group[group].wer, default=None)

    @property
    def worst_group_wer(self) -> float | None:
        return self.by_group[self.worst_group].wer if self.worst_group is not None else None

    @property
    def group_gap(self) -> float | None:
        """WER of the worst group minus WER of the best, a fraction; None if there are no groups."""
        wers = [errors.wer for errors in self.by_group.values()]
        return max(wers) - min(wers) if wers else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None if a value is unknown, or if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _summed_characters(counts: Sequence[CharacterErrors | None]) -> CharacterErrors | None:
    """None if a count is unknown."""
    known = [c for c in counts if c is not None]
    return sum(known, CharacterErrors()) if len(known) == len(counts) else None


def _summed(parts: Iterable[tuple[str | None, WordErrors]]) -> dict[str, WordErrors]:
    """Counts by name, sorted by name; counts without a name are left out."""
    sums: dict[str, WordErrors] = {}
    for name, errors in parts:
        if name:
            sums[name] = sums.get(name, WordErrors()) + errors
    return dict(sorted(sums.items()))


class Parameters(_Frozen):
    """Parameter counts of the built model, by group."""

    encoder: int
    projector: int
    lora: int
    llm: int

    @property
    def speech(self) -> int:
        """Parameters of the speech side: what a deployment adds to an LLM that it already has."""
        return self.encoder + self.projector + self.lora

    @property
    def total(self) -> int:
        return self.speech + self.llm

    def of(self, objective: str) -> int:
        """The count that `objective` names: `encoder_params`, `speech_params` or `total_params`."""
        return int(getattr(self, objective.removesuffix("_params")))


class Rung(_Frozen):
    """Dev errors after `step` training steps."""

    step: int
    errors: WordErrors


class RunCost(_Frozen):
    """Wall time in seconds, peak memory in bytes, and the micro-batch (utterances in memory at once) that fitted.

    No two runs cost exactly the same, so comparisons of records ignore it.
    """

    trial_seconds: float = 0.0  # the whole run
    train_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    repair_seconds: float = 0.0
    peak_memory_bytes: int = 0
    micro_batch: int = 0


class RepairSummary(_Frozen):
    """How the encoder and the projector were refitted in closed form before training, and what makes the weights again.

    The weights follow from the removed layers, the study's train split and these settings. `ridge` and `unexplained` are by the
    name of the map (`7.fc2`, `9.out_proj`, `projector.up`): the relative strength that was chosen on held-out utterances, and
    the squared error left there, as a fraction of the error before.
    """

    method: Literal["layers", "projector"]
    utterances: int
    ridge: dict[str, float]
    unexplained: dict[str, float]


class HeldOutLoss(_Frozen):
    """Loss on held-out utterances of train (nats per token) at a share of the way from the start to the trained weights."""

    share: float
    loss: float


class RunRecord(_Frozen):
    """The outcome of one candidate.

    name: the baseline's name; None for other candidates.
    dev: the result on dev after the last step. Of a pruned run, the result at its last rung; None if the run failed.
    test: None until test is decoded.
    reason: why the run was pruned or failed; None if it is complete.
    """

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
    repair: RepairSummary | None = None  # None: nothing was refitted
    rungs: tuple[Rung, ...] = ()  # the one at step 0 tells how far the repair alone goes
    interpolation: tuple[HeldOutLoss, ...] = ()  # the share with the smallest loss was kept; empty: the trained weights were
    losses: tuple[float, ...] = ()  # training cross-entropy per target token, nats, every tenth step
    parameters: Parameters
    cost: RunCost = RunCost()
    provenance: dict[str, Any] = {}

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.removed_layers, self.lora_rank, self.repeat)

    @property
    def rate(self) -> str:
        """What the study's error rate is called: WER, or CER or MER (mixed) if characters count as words in some languages."""
        return "WER" if self.dev is None else self.dev.metric.upper()

    @property
    def share(self) -> float | None:
        """The share of the way from the start to the trained weights that was kept; None if that was not asked."""
        return min(self.interpolation, key=lambda tried: tried.loss).share if self.interpolation else None

    @property
    def reported(self) -> tuple[Literal["test", "dev"], SplitResult] | None:
        """The split to report, and its result: test where it was decoded, else dev; None where neither was."""
        if self.test is not None:
            return "test", self.test
        return None if self.dev is None else ("dev", self.dev)

    def outcome(self) -> dict[str, Any]:
        """The fields that a second run of the same candidate must reproduce."""
        return self.model_dump(mode="json", exclude={"cost", "provenance"})


def record_folder(records: Path, candidate: Candidate) -> Path:
    """The folder of a candidate's files. Takes a parsed Candidate: a string from a storage might name any other folder."""
    return records / candidate.key


def write_record(records: Path, record: RunRecord) -> None:
    """Write `records/<key>/record.json`, or replace it as a whole."""
    path = record_folder(records, record.candidate) / "record.json"
    write_atomically(path, record.model_dump_json(indent=1) + "\n")


def read_record(records: Path, candidate: Candidate, study: str | None = None) -> RunRecord | None:
    """The candidate's record, or None if there is none. Raises StudyError for a file that is not that record.

    study: the name of the study that the record must belong to. Default: any.
    """
    path = record_folder(records, candidate) / "record.json"
    if not path.exists():
        return None
    record = _read_record_file(path)
    _check_study(records, {path: record}, study)
    return record


def read_records(records: Path, study: str | None = None) -> list[RunRecord]:
    """All records, sorted by key. Raises StudyError with one line per file that is not a record of its folder's candidate.

    study: the name of the study that the records must belong to. Default: any.
    """
    found: dict[Path, RunRecord] = {}
    errors: list[str] = []
    for path in sorted(records.glob("*/record.json")):
        try:
            found[path] = _read_record_file(path)
        except StudyError as error:
            errors += error.lines
    if errors:
        raise StudyError(errors)
    _check_study(records, found, study)
    return list(found.values())


def _check_study(records: Path, found: dict[Path, RunRecord], study: str | None) -> None:
    """Raises StudyError for records of another study. If no record is of this one, the study was renamed."""
    others = {path: record.study for path, record in found.items() if study not in (None, record.study)}
    if not others:
        return
    names = sorted(set(others.values()))
    fix = f"add name = {json.dumps(names[0])} to the study file"
    if len(others) == len(found) > 1 and len(names) == 1:
        rule = f"the records belong to the study {names[0]}, this study is {study}"
        reason = "a study without a name in its file is named after its folder"
        raise StudyError([f"{records}: {rule} ({reason}): {fix}, or move {records.parent} away to start anew"])
    raise StudyError(
        [
            f"{path}: the record belongs to the study {name}, this study is {study}: move {path.parent} away"
            + (f", or {fix} if the study was renamed" if len(found) == 1 else "")
            for path, name in others.items()
        ]
    )


def _read_record_file(path: Path) -> RunRecord:
    content = path.read_bytes()
    try:
        record = RunRecord.model_validate_json(content)
        key = record.candidate.key
    except ValidationError as error:
        raise StudyError([f"{path}: {_why_not_a_record(content, error)}"]) from None
    except ValueError as error:  # such as a negative layer
        raise StudyError([f"{path}: not a valid record ({error}): {_AGAIN}"]) from None
    if record.schema_version != SCHEMA_VERSION:
        raise StudyError([f"{path}: {_other_schema(record.schema_version)}"])
    if key != path.parent.name:
        rule = f"the folder must be named after the record's candidate, {key}, got {path.parent.name}"
        taken = (path.parent.with_name(key) / "record.json").exists()
        fix = f"delete the folder; {key} has a record of its own" if taken else "rename the folder, or delete it"
        raise StudyError([f"{path}: {rule}: {fix}"])
    if record.state == "complete" and record.dev is None:
        raise StudyError([f"{path}: not a valid record (dev: a complete record must have it): {_AGAIN}"])
    return record


def _why_not_a_record(content: bytes, error: ValidationError) -> str:
    """The rule that the content of a record.json breaks, and the fix."""
    if not content.strip(b"\0 \t\r\n"):
        return f"the record is empty: {_AGAIN}"
    try:
        raw = json.loads(content)
    except ValueError:  # includes UnicodeDecodeError
        return f"the record is cut off, or is not JSON: {_AGAIN}"
    version = raw.get("schema_version", SCHEMA_VERSION) if isinstance(raw, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        return _other_schema(version)
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"not a valid record ({f'{key}: ' if key else ''}{first['msg'].splitlines()[0]}): {_AGAIN}"


def _other_schema(version: Any) -> str:
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    fix = "update prunesearch to read it" if newer else _AGAIN
    return f"schema_version must be {SCHEMA_VERSION}, got {version!r}: {fix}"


def write_utterances(records: Path, candidate: Candidate, split: str, results: Iterable[UtteranceResult]) -> None:
    """Write `records/<key>/<split>.jsonl`, one utterance per line, or replace it as a whole."""
    lines = (json.dumps(r.model_dump(mode="json"), ensure_ascii=False) for r in results)
    write_atomically(record_folder(records, candidate) / f"{split}.jsonl", "\n".join(lines) + "\n")


def read_utterances(
    records: Path, candidate: Candidate, split: str, counted: SplitResult | None = None
) -> list[UtteranceResult] | None:
    """The utterances of a split, in the corpus's order; None if the split was not decoded.

    counted: the record's result on the split, to which the utterances must add up.

    Raises StudyError for a file that is cut off, has a line that is not an utterance, or does not belong to the record.
    """
    path = record_folder(records, candidate) / f"{split}.jsonl"
    if not path.exists():
        return None
    # split(), not splitlines(): a hypothesis may contain one of Unicode's other line ends
    *lines, rest = path.read_bytes().split(b"\n")
    if rest or not lines:  # the writer ends the last line, too
        raise StudyError([f"{path}: the file is {'cut off in line ' + str(len(lines) + 1) if rest else 'empty'}: {_RESTORE}"])
    results = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                results.append(UtteranceResult.model_validate_json(line))
        except ValidationError:
            raise StudyError([f"{path}: line {number} is not a decoded utterance: {_RESTORE}"]) from None
    if counted is not None:
        _check_counts(path, results, counted)
    return results


def _check_counts(path: Path, results: Sequence[UtteranceResult], counted: SplitResult) -> None:
    """Raises StudyError for utterances that do not add up to the record's result: the file lost lines, or is another one."""
    errors = sum((r.errors for r in results), WordErrors())
    if (len(results), errors) != (counted.utterances, counted.errors):
        rule = f"the file must hold the record's {counted.utterances} utterances with {counted.errors.errors} errors"
        raise StudyError([f"{path}: {rule}, got {len(results)} with {errors.errors}: {_RESTORE}"])
