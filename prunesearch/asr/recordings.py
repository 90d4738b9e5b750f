"""Recordings in, text out, on the command line: what to read, and how to write what was said."""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from prunesearch.study.errors import StudyError

Form = Literal["text", "json", "srt"]

KINDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf", ".m4a")


@contextmanager
def recordings(arguments: Sequence[str]) -> Iterator[dict[str, Path]]:
    """By name: files, the recordings in folders, and `-` for standard input. Raises StudyError for what is not there."""
    found: dict[str, Path] = {}
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for argument in arguments:
            path = Path(argument)
            if argument == "-":
                file = Path(scratch) / "stdin"
                file.write_bytes(sys.stdin.buffer.read())
                found["stdin"] = file
            elif path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS)
                problems += [] if inside else [f"{path}: no recording in this folder ({', '.join(KINDS)})"]
                found |= {str(p): p for p in inside}
            elif path.is_file():
                found[argument] = path
            else:
                problems.append(f"{argument}: there is no such file")
        if problems:
            raise StudyError(problems)
        yield found


def transcribe(
    asr: Any, files: dict[str, Path], beams: int | None = None
) -> Iterator[tuple[str, list[Any] | None, str | None]]:
    """(name, segments, None) of each recording, or (name, None, what is wrong with it), which spoils nothing else."""
    from prunesearch.speech.audio import AudioError, read_audio

    for name, path in files.items():
        try:
            samples = read_audio(path)
        except AudioError as error:
            yield name, None, str(error)
        else:
            yield name, asr.segments([samples], beams=beams)[0], None


def written(name: str, segments: Sequence[Any], form: Form, alone: bool) -> str:
    """One recording's transcript: plain text (with its name, where there are several), a JSON object, or SubRip."""
    text = " ".join(s.text for s in segments if s.text)
    if form == "json":
        parts = [{"start": round(s.start, 2), "end": round(s.end, 2), "text": s.text} for s in segments]
        return json.dumps({"audio": name, "text": text, "segments": parts}, ensure_ascii=False)
    if form == "srt":
        return "\n".join(f"{n}\n{_clock(s.start)} --> {_clock(s.end)}\n{s.text}\n" for n, s in enumerate(segments, 1))
    return text if alone else f"{name}\t{text}"


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def evaluate(asr: Any, manifest: Path, batch_size: int | None = None, beams: int | None = None) -> dict[str, Any]:
    """Corpus WER of a manifest (JSONL with `audio`, `text` and, where there is one, `language`), in all and by language.

    Raises StudyError for a manifest or a recording that cannot be used.
    """
    from prunesearch.speech.audio import AudioError, read_audio
    from prunesearch.speech.text import normalizer_for
    from prunesearch.speech.wer import count_errors, is_loop
    from prunesearch.study.record import SplitResult, UtteranceResult

    rows, samples, problems = [], [], []
    if not manifest.is_file():
        raise StudyError([f"--data: there is no such file, {manifest}"])
    for number, line in enumerate(manifest.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row["audio"], row["text"], row.get("language")))
            samples.append(read_audio(manifest.parent / row["audio"]))
        except (ValueError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, AudioError) else f"needs `audio` and `text` ({error!r})"
            problems.append(f"{manifest}:{number}: {said}")
    if problems or not rows:
        raise StudyError(problems[:20] or [f"--data: {manifest} holds no line"])
    results = []
    for (audio, text, language), hypothesis in zip(rows, asr.transcribe(samples, batch_size, beams), strict=True):
        normalise = normalizer_for(asr.settings.text.normalizer_of(language), language)
        reference, said = normalise(text), normalise(hypothesis)
        errors = count_errors(reference, said)
        results.append(
            UtteranceResult(
                id=audio,
                reference=reference,
                hypothesis=said,
                errors=errors,
                language=language,
                looped=is_loop(reference, said),
            )
        )
    split = SplitResult.of(results)
    return {
        "wer": split.errors.wer,
        **split.errors.model_dump(),
        "utterances": split.utterances,
        "loop_rate": split.loop_rate,
        "empty_rate": split.empty_rate,
        "by_language": {name: e.wer for name, e in split.by_language.items()},
    }
