"""Manifests -> utterances. A manifest is JSONL, one utterance a line:

    {"audio": "clips/0001.opus", "text": "open the window", "language": "en", "speaker": "f3", "duration": 1.9}

`audio` is relative to the manifest. Only `audio` and `text` are required.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunesearch.config import StudyConfig, StudyError
from prunesearch.speech.audio import AudioError, seconds_of
from prunesearch.speech.text import normalizer_for

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Utterance:
    """One recording and what is said in it: `reference` as it is scored, `target` as the LLM is taught to write it."""

    id: str
    audio: Path
    reference: str
    target: str
    seconds: float
    language: str | None = None
    group: str | None = None


def load_corpus(config: StudyConfig, split: Split) -> list[Utterance]:
    """The split's utterances, within the study's limits of duration and number, in the manifest's order.

    A smaller number is a draw by the study's seed. Raises StudyError naming every line that cannot be used.
    """
    manifest = Path(config.locate(getattr(config.data, split)))
    problems: list[str] = []
    utterances: list[Utterance] = []
    try:
        lines = manifest.read_text(encoding="utf-8").split("\n")  # JSON may hold Unicode's other line ends
    except UnicodeDecodeError as error:
        raise StudyError([f"{manifest}: must be UTF-8 ({error})"]) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            utterances.append(_utterance(json.loads(line), manifest, config))
        except ValueError as error:  # of JSON, of a field, or of the audio
            problems.append(f"{manifest}:{number}: {error}")
    unreadable = [p for p in problems if not config.data.skip_unreadable]
    if unreadable:
        more = [f"… and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
        raise StudyError(unreadable[:20] + more + ["data.skip_unreadable = true goes on without them"])
    kept = [u for u in utterances if config.data.min_seconds <= u.seconds <= config.data.max_seconds and u.reference]
    if not kept:
        raise StudyError([f"{manifest}: no utterance of {config.data.min_seconds} to {config.data.max_seconds} s with a text"])
    most = getattr(config.data, f"max_{split}_utterances")
    if most is not None and most < len(kept):
        chosen = sorted(random.Random(f"{config.seed} {split}").sample(range(len(kept)), most))
        kept = [kept[i] for i in chosen]
    return kept


def _utterance(row: Any, manifest: Path, config: StudyConfig) -> Utterance:
    if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not isinstance(row.get("text"), str):
        raise ValueError("a line must be an object with the strings `audio` and `text`")
    audio = manifest.parent / row["audio"]
    language = row.get("language")
    normalize = normalizer_for(config.text.normalizer, language)
    reference = normalize(row["text"])
    group = row.get(config.data.group) if config.data.group else None
    if not audio.is_file():
        raise AudioError(f"{audio}: there is no such file")
    return Utterance(
        id=str(row.get("id", row["audio"])),
        audio=audio,
        reference=reference,
        target=reference if config.text.normalizer == "paper" else " ".join(row["text"].split()),
        seconds=float(row["duration"]) if isinstance(row.get("duration"), int | float) else seconds_of(audio),
        language=language,
        group=None if group is None else str(group),
    )
