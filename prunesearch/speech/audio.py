"""Recordings -> mono samples at 16 kHz."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 16_000


class AudioError(ValueError):
    """A recording cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Cell:
    """A recording within a Hugging Face dataset whose audio column is not decoded."""

    dataset: Any
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.column!r}"


Recording = Path | Cell


def _opened(recording: Recording) -> Path | io.BytesIO:
    """What soundfile can read. Raises AudioError when there is no such recording."""
    if isinstance(recording, Cell):
        cell = recording.dataset[recording.row][recording.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise AudioError(f"{recording}: holds no recording")
        if cell["bytes"] is not None:
            return io.BytesIO(cell["bytes"])
        recording = Path(cell["path"])
    if not recording.is_file():
        raise AudioError(f"{recording}: {'is a folder' if recording.is_dir() else 'there is no such file'}")
    return recording


def version_of(recording: Recording) -> str | None:
    """What tells a recording from another under the same name: a file's size and time, if it is there; a dataset's
    fingerprint."""
    if isinstance(recording, Cell):
        return str(recording.dataset._fingerprint)
    if not recording.exists():
        return None
    found = recording.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def is_there(recording: Recording) -> bool:
    """Whether there is something to decode; of a file, it is looked at, not into."""
    return isinstance(recording, Cell) or (recording.is_file() and recording.stat().st_size > 0)


def read_audio(recording: Recording) -> NDArray[np.float32]:
    """Samples in [-1, 1], (samples,): channels averaged, resampled to 16 kHz. The content tells the format, not the name.

    Raises AudioError when the recording is missing, empty, silent, cut off, no audio, or holds values that are not finite.
    """
    source = _opened(recording)
    try:
        with soundfile.SoundFile(source) as file:
            announced, rate = _announced_frames(file), file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"{recording}: cannot be decoded ({getattr(error, 'error_string', error)})") from None
    if len(samples) == 0:
        raise AudioError(f"{recording}: holds no samples")
    if len(samples) < 0.95 * announced:
        raise AudioError(f"{recording}: is cut off after {len(samples) / rate:.2f} of {announced / rate:.2f} s")
    if not np.isfinite(samples).all():
        raise AudioError(f"{recording}: holds samples that are not finite")
    if not samples.any():
        raise AudioError(f"{recording}: holds nothing but silence")
    mono = samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32)


def _announced_frames(file: soundfile.SoundFile) -> int:
    """What the header promises. Of a WAV that was cut off, libsndfile mends the count, and tells of it in its log."""
    mended = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if mended and 0 < int(mended[2]) < int(mended[1]) < 0x7FFFFFFF - 0xFFFF:  # streams promise the largest number there is
        return file.frames * int(mended[1]) // int(mended[2])
    return int(file.frames)


def seconds_of(recording: Recording) -> float:
    """The duration that the header states. Raises AudioError as `read_audio` does."""
    source = _opened(recording)
    try:
        return float(soundfile.info(source).duration)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"{recording}: cannot be decoded ({getattr(error, 'error_string', error)})") from None


def padded(samples: NDArray[np.float32], multiple_seconds: float | None) -> NDArray[np.float32]:
    """The samples with silence behind them, up to the next multiple of so many seconds."""
    if multiple_seconds is None:
        return samples
    block = round(multiple_seconds * SAMPLE_RATE)
    return np.pad(samples, (0, -len(samples) % block))
