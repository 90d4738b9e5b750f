"""A split's utterances from its sources: within the study's limits, drawn by its seed, with readable recordings only."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from filelock import FileLock

from prunesearch.speech.audio import SAMPLE_RATE, AudioError, Recording, is_there, read_audio, seconds_of, version_of
from prunesearch.speech.sources import Row, read_source
from prunesearch.speech.text import none, normalizer_for
from prunesearch.study.config import Split, StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.files import read_unless_damaged, write_atomically

Progress = Callable[[str, int, int], None]  # what, done, total


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
    """A split. `dropped` are its sources' unusable lines; lines that were merely not drawn are in neither list."""

    utterances: list[Utterance]
    dropped: list[Dropped]

    def report(self) -> dict[str, Any]:
        """Hours and counts, in total and by language, and every dropped line with its reason."""
        languages = sorted({u.language or "" for u in self.utterances})
        return {
            "utterances": len(self.utterances),
            "hours": _hours(self.utterances),
            "languages": {
                name: {"utterances": len(those), "hours": _hours(those)}
                for name in languages
                if (those := [u for u in self.utterances if (u.language or "") == name])
            },
            "dropped": [asdict(d) for d in self.dropped],
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


def checked_corpus(config: StudyConfig, split: Split, progress: Progress) -> Corpus:
    """As `load_corpus`, after decoding every recording once, so that an unreadable one is reported before training.

    Lengths are those of the decoded samples, not those of headers or manifests. The result is stored in the study's run
    folder as `corpus/<split>.json`, and used again for the same recordings. Raises StudyError as `load_corpus` does.
    """
    problems, corpus = _select(config, split)
    recordings = [(u.id, version_of(u.audio)) for u in corpus.utterances]
    identity = hashlib.sha256(json.dumps(["seconds", recordings]).encode()).hexdigest()[:16]  # "seconds": what is stored
    path = config.run_folder / "corpus" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = read_unless_damaged(path, dict[str, Any]) or {}
        if known.get("identity") == identity:
            unreadable, seconds = known["unreadable"], known["seconds"]
        else:
            unreadable, seconds = _decode_all(corpus.utterances, split, progress)
        _require_no_problem([*(d.reason for d in problems), *unreadable.values()], config)
        kept = [replace(u, seconds=seconds[u.id]) for u in corpus.utterances if u.id not in unreadable]
        corpus = Corpus(kept, corpus.dropped + [Dropped(i, reason) for i, reason in unreadable.items()])
        if known.get("identity") != identity:
            whole = {"identity": identity, **corpus.report(), "unreadable": unreadable, "seconds": seconds}
            write_atomically(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    _require_utterances(kept, config, split)
    return corpus


def _decode_all(utterances: Sequence[Utterance], split: Split, progress: Progress) -> tuple[dict[str, str], dict[str, float]]:
    """By utterance id: the reasons why recordings cannot be used, and the seconds of the others."""
    unreadable: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor() as pool:  # libsndfile releases Python's global lock
        for done, (utterance, found) in enumerate(zip(utterances, pool.map(_decoded_seconds, utterances), strict=True)):
            if isinstance(found, AudioError):
                unreadable[utterance.id] = str(found)
            else:
                seconds[utterance.id] = found
            if done % 100 == 0:
                progress(f"checking the recordings of {split}", done, len(utterances))
    return unreadable, seconds


def _decoded_seconds(utterance: Utterance) -> float | AudioError:
    try:
        return len(read_audio(utterance.audio)) / SAMPLE_RATE
    except AudioError as error:
        return error


def _require_no_problem(problems: Sequence[str], config: StudyConfig) -> None:
    """Raises StudyError with (at most 20) problems, unless the study has `skip_unreadable`."""
    if problems and not config.data.skip_unreadable:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise StudyError([*problems[:20], *more, "data.skip_unreadable = true leaves them out"])


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
                limits = f"{data.min_seconds:g} to {data.max_seconds:g} s"
                outside.append(Dropped(utterance.id, f"lasts {utterance.seconds:.2f} s, outside {limits}"))
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
        # a missing or empty file is reported here, also where the source gives the duration
        seconds = seconds_of(row.audio) if row.seconds is None or not is_there(row.audio) else row.seconds
    except AudioError as error:
        return Dropped(row.id, f"{row.where}: {error}")
    name = config.text.normalizer_of(row.language)
    reference = normalizer_for(name, row.language)(row.text)
    target = reference if name == "paper" else none(row.text)
    return Utterance(row.id, row.audio, reference, target, seconds, row.language, row.group)
