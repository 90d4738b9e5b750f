"""Word errors of an exported system on a manifest."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesearch.speech.audio import SAMPLE_RATE, AudioError, read_audio
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import score
from prunesearch.study.config import TextConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import SplitResult

if TYPE_CHECKING:
    from prunesearch.asr.slam_asr import Samples, SlamAsr


def score_manifest(asr: "SlamAsr", manifest: Path, batch_size: int | None = None, beams: int | None = None) -> dict[str, Any]:
    """Corpus WER of a manifest (JSONL with `audio`, `text` and optionally `language`), in total and by language.

    Texts are normalised as in the system's study. `batch_size` and `beams`: see `SlamAsr.transcribe`.
    Raises StudyError for a manifest or a recording that cannot be used.
    """
    utterances, samples = _read_manifest(manifest, asr.settings.text)
    results = []
    for utterance, segments in zip(utterances, asr.segments(samples, batch_size, beams), strict=True):
        normalize = normalizer_for(asr.settings.text.normalizer_of(utterance.language), utterance.language)
        result = score(utterance, normalize(" ".join(s.text for s in segments if s.text)))
        results.append(result.model_copy(update={"reached_limit": any(s.reached_limit for s in segments)}))
    split = SplitResult.of(results)
    return {
        "wer": split.errors.wer,
        **split.errors.model_dump(),
        "utterances": split.utterances,
        "loop_rate": split.loop_rate,
        "empty_rate": split.empty_rate,
        "token_limit_rate": split.token_limit_rate,
        "by_language": {name: e.wer for name, e in split.by_language.items()},
    }


def _read_manifest(manifest: Path, text: TextConfig) -> tuple[list[Utterance], list["Samples"]]:
    """Utterances with normalised references, and their samples. Raises StudyError with (at most 20) lines that are wrong."""
    if not manifest.is_file():
        raise StudyError([f"--data: there is no file {manifest}"])
    utterances, samples, problems = [], [], []
    for number, line in enumerate(_lines(manifest), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, language = row["audio"], row.get("language")
            reference = normalizer_for(text.normalizer_of(language), language)(row["text"])
            samples.append(read_audio(manifest.parent / audio))
        except AudioError as error:
            problems.append(f"{manifest}:{number}: {error}")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{manifest}:{number}: must be a JSON object with `audio` and `text` ({error!r})")
        else:
            seconds = len(samples[-1]) / SAMPLE_RATE
            utterances.append(Utterance(audio, manifest.parent / audio, reference, row["text"], seconds, language))
    if problems:
        raise StudyError(problems[:20])
    if not utterances:
        raise StudyError([f"--data: {manifest} has no line"])
    return utterances, samples


def _lines(manifest: Path) -> list[str]:
    try:
        return manifest.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON may hold Unicode's other line ends
    except UnicodeDecodeError as error:
        raise StudyError([f"--data: {manifest} must be UTF-8 ({error})"]) from None
