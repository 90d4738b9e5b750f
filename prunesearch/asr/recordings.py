"""Recordings named on a command line: find them, transcribe them one after the other, format their transcripts."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunesearch.speech.audio import AudioError, display_name, read_audio
from prunesearch.study.errors import StudyError

if TYPE_CHECKING:
    from prunesearch.asr.recognizer import Recognizer, Segment

TranscriptFormat = Literal["text", "json", "srt"]

# Formats of recordings. Some of the last ones cannot be decoded: they are named, and not passed over.
SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".w64", ".rf64", ".caf", ".sph",
    ".voc", ".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp",
)  # fmt: skip


@dataclass(frozen=True)
class Transcript:
    """One recording's transcript, or the `problem` that made it unusable (and then no segments)."""

    name: str
    segments: Sequence["Segment"] = ()
    problem: str | None = None


@contextmanager
def recordings(arguments: Sequence[str]) -> Iterator[dict[str, Path]]:
    """The recordings that arguments name: files, all recordings in a folder, and `-` for standard input.

    Yields paths by name. macOS's companion files (`._name`) in a folder are passed over. A file that is not there is yielded,
    and cannot be read later, so that it does not cost the others. Raises StudyError for every argument that names no recording
    if none does.
    """
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
                inside = sorted(p for p in path.rglob("*") if _is_recording(p))
                problems += [] if inside else [f"{display_name(path)}: no recording in this folder ({', '.join(SUFFIXES)})"]
                found |= {str(p): p for p in inside} or {argument: path}
            else:
                found[argument] = path
                problems += [] if path.exists() else [f"{display_name(argument)}: there is no such file"]
        if len(problems) == len(found):
            raise StudyError(problems)
        yield found


def _is_recording(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._") and path.is_file()


def transcribe_files(
    asr: "Recognizer", files: Mapping[str, Path], beams: int | None = None, language: str | None = None
) -> Iterator[Transcript]:
    """Transcribe files one after the other. A file that cannot be used gives a transcript with a problem.

    `language`: spoken in all of them, for systems that take one. Raises StudyError for one that the system does not know.
    """
    for argument, path in files.items():
        name = display_name(argument)
        try:
            samples = read_audio(path)
        except AudioError as error:
            yield Transcript(name, problem=str(error))
        else:
            yield Transcript(name, asr.segments([samples], beams=beams, language=language)[0])


def format_transcript(transcript: Transcript, form: TranscriptFormat, with_name: bool = False) -> str:
    """A transcript as plain text (behind the recording's name if `with_name`), as a JSON object, or as SubRip."""
    segments = transcript.segments
    text = " ".join(s.text for s in segments if s.text)
    if form == "json":
        parts = [{"start": round(s.start, 2), "end": round(s.end, 2), "text": s.text} for s in segments]
        return json.dumps({"audio": transcript.name, "text": text, "segments": parts}, ensure_ascii=False)
    if form == "srt":
        return "\n".join(f"{n}\n{_clock(s.start)} --> {_clock(s.end)}\n{s.text}\n" for n, s in enumerate(segments, 1))
    return f"{transcript.name}\t{text}" if with_name else text


def _clock(seconds: float) -> str:
    """SubRip's hours:minutes:seconds,milliseconds."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"
