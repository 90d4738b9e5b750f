"""A split's utterances from its sources: within the study's limits, drawn by its seed, with readable recordings only."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from filelock import FileLock

from prunesearch.speech.audio import SAMPLE_RATE, AudioError, Recording, decode_audio, is_there, seconds_of, version_of
from prunesearch.speech.sources import Row, read_source
from prunesearch.speech.text import none, normalizer_for
from prunesearch.study.config import Split, StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import read_unless_damaged, write_atomically

Progress = Callable[[str, int, int], None]  # what, done, total
ROUNDING_SECONDS = 0.01  # by which headers, manifests and resampled recordings differ


@dataclass(frozen=True)
class Utterance:
    """A recording and its transcript: `reference` is normalised for scoring, `target` is the LLM's training target."""

    id: str
    audio: Recording
    reference: str
    target: str
    seconds: float
    language: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A line of a source that the study does not use, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """A split. `dropped` are its sources' unusable lines; lines that were merely not drawn are in neither list.

    end_unknown: ids of utterances whose file announces neither its length nor its end, so that it cannot be known whether it
    was cut off. None if the recordings were not decoded.
    """

    utterances: list[Utterance]
    dropped: list[Dropped]
    end_unknown: list[str] | None = None

    def report(self) -> dict[str, Any]:
        """Hours and counts, in total and by language, every dropped line with its reason, and recordings of unknown end."""
        languages = sorted({u.language or "" for u in self.utterances})
        return {
            "utterances": len(self.utterances),
            "hours": _hours(self.utterances),
            "languages": {
                name: {"utterances": len(those), "hours": _hours(those)}
                for name in languages
                if (those := [u for u in self.utterances if (u.language or "") == name])
            },
            "dropped": [{"id": d.id, "reason": d.reason.removeprefix(f"{d.id}: ")} for d in self.dropped],
            "end_unknown": self.end_unknown,
        }


def _hours(utterances: Sequence[Utterance]) -> float:
    return round(sum(u.seconds for u in utterances) / 3600, 4)


def fingerprint(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """A split's count, hours, and a digest of its texts and lengths: the same on every machine, whatever the paths."""
    rows = [(u.reference, u.target, round(u.seconds, 3), u.language, u.group) for u in utterances]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return {"utterances": len(utterances), "hours": _hours(utterances), "digest": digest}


def load_corpus(config: StudyConfig, split: Split) -> list[Utterance]:
    """The split's utterances, in their sources' order. Of the recordings, only the headers are read.

    Raises StudyError that names every line that cannot be used, unless the study has `skip_unreadable`.
    """
    problems, corpus = _select(config, split)
    _require_no_problem([d.reason for d in problems], config)
    _require_utterances(corpus.utterances, config, split)
    return corpus.utterances


@dataclass(frozen=True)
class _Checked:
    """What decoding a split's recordings told, by utterance id: why some cannot be used, and the seconds of the others.

    end_unknown: ids of recordings of which it cannot be known whether they were cut off.
    """

    unreadable: dict[str, str]
    seconds: dict[str, float]
    end_unknown: list[str]


def checked_corpus(config: StudyConfig, split: Split, progress: Progress, window_seconds: float = math.inf) -> Corpus:
    """As `load_corpus`, after decoding every recording once, so that an unreadable one is reported before training.

    window_seconds: the longest recording that the encoder takes, padding included; a longer one counts as unreadable.

    Lengths are those of the decoded samples, not those of headers or manifests, and the study's limits hold for them. What
    decoding told is stored in the study's run folder as `corpus/<split>.json`, and used again for the same recordings. Raises
    StudyError as `load_corpus` does.
    """
    problems, corpus = _select(config, split)
    recordings = [(u.id, version_of(u.audio)) for u in corpus.utterances]
    stored = ["seconds", "end_unknown"]
    identity = hashlib.sha256(json.dumps([stored, recordings]).encode()).hexdigest()[:16]
    path = config.run_folder / "corpus" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = read_unless_damaged(path, dict[str, Any]) or {}
        if known.get("identity") == identity:
            found = _Checked(known["unreadable"], known["seconds"], known["decoded_end_unknown"])
        else:
            found = _decode_all(corpus.utterances, split, progress)
        corpus, too_long = _within_limits(config, split, corpus, found, window_seconds)
        advice = [f"data.max_seconds: set it to at most {window_seconds:g}"] if too_long else []
        _require_no_problem([*(d.reason for d in problems), *found.unreadable.values(), *too_long], config, advice)
        if known.get("identity") != identity:
            write_atomically(path, _stored_report(identity, corpus, found))
    _require_utterances(corpus.utterances, config, split)
    return corpus


def _stored_report(identity: str, corpus: Corpus, found: _Checked) -> str:
    """The corpus's report, and what decoding told, for the next time."""
    decoded = {"unreadable": found.unreadable, "seconds": found.seconds, "decoded_end_unknown": found.end_unknown}
    return json.dumps({"identity": identity, **corpus.report(), **decoded}, indent=1, ensure_ascii=False) + "\n"


def _within_limits(
    config: StudyConfig, split: Split, corpus: Corpus, found: _Checked, window_seconds: float
) -> tuple[Corpus, list[str]]:
    """The utterances whose decoded length is within the study's limits; and a line for each that the encoder cannot take."""
    data, block = config.data, config.data.pad_to_seconds
    kept: list[Utterance] = []
    dropped = [Dropped(i, reason) for i, reason in found.unreadable.items()]
    too_long: list[str] = []
    for utterance in corpus.utterances:
        if utterance.id in found.unreadable:
            continue
        seconds = found.seconds[utterance.id]
        padded = seconds if block is None else math.ceil(seconds / block) * block
        if not data.min_seconds <= seconds <= data.max_seconds and abs(seconds - utterance.seconds) > ROUNDING_SECONDS:
            dropped.append(Dropped(utterance.id, _outside(seconds, config)))
        elif padded - window_seconds >= ROUNDING_SECONDS:  # Whisper's features round down to 10 ms
            padding = "" if padded == seconds else f" ({padded:g} s with padding)"
            reason = f"lasts {seconds:.2f} s{padding}, longer than the encoder's window of {window_seconds:g} s"
            dropped.append(Dropped(utterance.id, reason))
            too_long.append(f"{utterance.id}: {reason}")
        else:
            kept.append(replace(utterance, seconds=seconds))
    hours = data.max_train_hours if split == "train" else None
    if hours is not None and sum(u.seconds for u in kept) > 3600 * hours * 1.01:  # manifests claimed less than there is
        kept = _draw(kept, config, split)
    ids = {u.id for u in kept}
    return Corpus(kept, corpus.dropped + dropped, [i for i in found.end_unknown if i in ids]), too_long


def _decode_all(utterances: Sequence[Utterance], split: Split, progress: Progress) -> _Checked:
    checked = _Checked({}, {}, [])
    with ThreadPoolExecutor() as pool:  # libsndfile releases Python's global lock
        for done, (utterance, found) in enumerate(zip(utterances, pool.map(_decoded, utterances), strict=True)):
            if isinstance(found, AudioError):
                checked.unreadable[utterance.id] = str(found)
            else:
                checked.seconds[utterance.id], end_is_known = found
                checked.end_unknown.extend([] if end_is_known else [utterance.id])
            if done % 100 == 0:
                progress(f"checking the recordings of {split}", done, len(utterances))
    return checked


def _decoded(utterance: Utterance) -> tuple[float, bool] | AudioError:
    """The seconds of a recording, and whether its end is known; or why it cannot be used."""
    try:
        decoded = decode_audio(utterance.audio)
    except AudioError as error:
        return error
    return len(decoded.samples) / SAMPLE_RATE, decoded.end_is_known


def _require_no_problem(problems: Sequence[str], config: StudyConfig, advice: Sequence[str] = ()) -> None:
    """Raises StudyError with (at most 20) problems and advice, unless the study has `skip_unreadable`."""
    if problems and not config.data.skip_unreadable:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise StudyError([*problems[:20], *more, *advice, "data.skip_unreadable = true leaves them out"])


def _outside(seconds: float, config: StudyConfig) -> str:
    return f"lasts {seconds:.2f} s, outside {config.data.min_seconds:g} to {config.data.max_seconds:g} s"


def _require_utterances(utterances: list[Utterance], config: StudyConfig, split: Split) -> None:
    """Raises StudyError where nothing is left of a split."""
    if not utterances:
        sources = ", ".join(map(str, getattr(config.data, split)))
        limits = f"{config.data.min_seconds:g} to {config.data.max_seconds:g} s"
        text = "" if split == "repair" else " with a text"
        raise StudyError([f"data.{split}: {sources}: no readable utterance of {limits}{text}"])


def _select(config: StudyConfig, split: Split) -> tuple[list[Dropped], Corpus]:
    """The rows that cannot be used; and the corpus: utterances within the limits, drawn if the study asks for fewer."""
    data = config.data
    sources = getattr(data, split)
    problems: list[Dropped] = []
    outside: list[Dropped] = []
    kept: list[Utterance] = []
    ids: set[str] = set()
    for source in sources:
        for row in read_source(source, config, transcribed=split != "repair"):
            utterance = _utterance(row, config)
            if isinstance(utterance, Dropped):
                problems.append(utterance)
                continue
            if utterance.id in ids:
                utterance = replace(utterance, id=f"{utterance.id}#{len(ids)}")
            ids.add(utterance.id)
            if not utterance.reference and split != "repair":
                outside.append(Dropped(utterance.id, "its text is empty after normalisation"))
            elif not data.min_seconds <= utterance.seconds <= data.max_seconds:
                outside.append(Dropped(utterance.id, _outside(utterance.seconds, config)))
            else:
                kept.append(utterance)
    return problems, Corpus(_draw(kept, config, split), problems + outside)


def _draw(utterances: list[Utterance], config: StudyConfig, split: Split) -> list[Utterance]:
    """A random subset of the size that the study asks for, in order. With one seed, a smaller draw is part of a larger one."""
    most = None if split == "repair" else getattr(config.data, f"max_{split}_utterances")
    hours = config.data.max_train_hours if split == "train" else None
    if (most is None or most >= len(utterances)) and hours is None:
        return utterances
    order = list(range(len(utterances)))
    random.Random(f"{config.seed} {split}").shuffle(order)
    chosen: list[int] = []
    seconds = 0.0
    for i in order[:most]:
        seconds += utterances[i].seconds
        if hours is not None and seconds > 3600 * hours and chosen:
            break
        chosen.append(i)
    return [utterances[i] for i in sorted(chosen)]


def _utterance(row: Row, config: StudyConfig) -> Utterance | Dropped:
    """The row with its duration and normalised texts, or the reason why it cannot be used."""
    if row.problem:
        return Dropped(row.id, f"{row.where}: {row.problem}")
    try:
        # a missing or empty file is reported here, also where the source gives the duration; and a source's word alone
        # excludes no recording
        seconds = row.seconds
        if seconds is None or not config.data.min_seconds <= seconds <= config.data.max_seconds or not is_there(row.audio):
            seconds = seconds_of(row.audio)
    except AudioError as error:
        return Dropped(row.id, f"{row.where}: {error}")
    language = row.language or (config.model.language if config.model else None)
    name = config.text.normalizer_of(language)
    reference = normalizer_for(name, language)(row.text)
    target = reference if name == "paper" else none(row.text)
    name_of_row = row.id.encode("utf-8", "backslashreplace").decode()  # bytes of a file name may not be UTF-8
    return Utterance(name_of_row, row.audio, reference, target, seconds, language, row.group)
