"""Word errors of an exported system on a manifest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesearch.speech.audio import SAMPLE_RATE, AudioError, Recording, is_there, read_audio
from prunesearch.speech.corpus import Utterance
from prunesearch.speech.tables import read_manifest
from prunesearch.speech.text import normalizer_for
from prunesearch.speech.wer import score
from prunesearch.study.config import TextConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import SplitResult

if TYPE_CHECKING:
    from prunesearch.asr.recognizer import Recognizer, Samples


def score_manifest(
    asr: "Recognizer", manifest: Path, batch_size: int | None = None, beams: int | None = None
) -> dict[str, Any]:
    """Corpus WER of a manifest (JSONL with `audio`, `text` and optionally `language`), in total and by language.

    Texts are normalised as in the system's study. `batch_size` and `beams`: see `Recognizer.transcribe`.
    Raises StudyError for a manifest or a recording that cannot be used.
    """
    utterances, samples = _read_manifest(manifest, asr.settings.text)
    languages, results = [u.language for u in utterances], []
    for utterance, segments in zip(utterances, asr.segments(samples, batch_size, beams, languages), strict=True):
        normalize = normalizer_for(asr.settings.text.normalizer_of(utterance.language), utterance.language)
        result = score(utterance, normalize(" ".join(s.text for s in segments if s.text)), asr.settings.text)
        results.append(result.model_copy(update={"reached_limit": any(s.reached_limit for s in segments)}))
    split = SplitResult.of(results)
    return {
        "metric": split.metric,
        "wer": split.errors.wer,
        **split.errors.model_dump(),
        "cer": split.characters and split.characters.cer,
        "utterances": split.utterances,
        "loop_rate": split.loop_rate,
        "empty_rate": split.empty_rate,
        "token_limit_rate": split.token_limit_rate,
        "switched_rate": split.switched_rate,
        "by_language": {name: e.wer if e.reference_words else None for name, e in split.by_language.items()},
    }


def _read_manifest(manifest: Path, text: TextConfig) -> tuple[list[Utterance], list["Samples"]]:
    """Utterances with normalised references, and their samples. Lines come first: if one is wrong, no recording is read.

    Raises StudyError with (at most 20) lines that are wrong, and where no reference has a word.
    """
    if not manifest.is_file():
        raise StudyError([f"--data: there is no file {manifest}"])
    rows = read_manifest(manifest)
    _require_none([f"{row.where}: {problem}" for row in rows if (problem := row.problem or _missing(row.audio))])
    if not rows:
        raise StudyError([f"--data: {manifest} has no line"])
    references = [normalizer_for(text.normalizer_of(row.language), row.language)(row.text) for row in rows]
    if not any(references):
        raise StudyError(
            [f"--data: {manifest}: no text has a word left after normalisation: there is nothing to count errors in"]
        )
    utterances, samples, problems = [], [], []
    for row, reference in zip(rows, references, strict=True):
        try:
            samples.append(read_audio(row.audio))
        except AudioError as error:
            problems.append(f"{row.where}: {error}")
        else:
            seconds = len(samples[-1]) / SAMPLE_RATE
            utterances.append(Utterance(row.id, row.audio, reference, row.text, seconds, row.language))
    _require_none(problems)
    return utterances, samples


def _missing(recording: Recording) -> str | None:
    """Why a recording is not there; None if it is. A recording that is there is not read."""
    try:
        if not is_there(recording):
            read_audio(recording)
    except AudioError as error:
        return str(error)
    return None


def _require_none(problems: list[str]) -> None:
    """Raises StudyError with (at most 20) problems."""
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise StudyError([*problems[:20], *more])
