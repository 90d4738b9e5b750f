"""Read recordings as mono samples at 16 kHz."""

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
    """A recording in a row of a Hugging Face dataset whose audio column is not decoded."""

    dataset: Any
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.column!r}"


Recording = Path | Cell


def _open_source(recording: Recording) -> Path | io.BytesIO:
    """The path or bytes for soundfile to read. Raises AudioError when there is no such recording."""
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
    """A string that changes when a recording changes but keeps its name.

    Of a file: its size and modification time (None if there is no such file). Of a dataset's row: the dataset's fingerprint.
    """
    if isinstance(recording, Cell):
        return str(recording.dataset._fingerprint)
    if not recording.exists():
        return None
    found = recording.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def is_there(recording: Recording) -> bool:
    """Whether a file exists and is not empty; it is not read. True for a row of a dataset."""
    return isinstance(recording, Cell) or (recording.is_file() and recording.stat().st_size > 0)


def read_audio(recording: Recording) -> NDArray[np.float32]:
    """Samples (N,) in [-1, 1]: channels are averaged, and resampled to 16 kHz. The format is detected from the content, not
    from the file's name.

    Raises AudioError when the recording is missing, empty, silent, truncated, not audio, or has values that are not finite.
    """
    source = _open_source(recording)
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
    """The number of frames in the header. libsndfile corrects the count of a truncated WAV, and says so in its log."""
    corrected = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    # a header written before the length was known (by a streaming encoder) announces the largest number there is
    if corrected and 0 < int(corrected[2]) < int(corrected[1]) < 0x7FFFFFFF - 0xFFFF:
        return file.frames * int(corrected[1]) // int(corrected[2])
    return int(file.frames)


def seconds_of(recording: Recording) -> float:
    """The duration in the header. Raises AudioError where there is no readable header."""
    source = _open_source(recording)
    try:
        return float(soundfile.info(source).duration)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"{recording}: cannot be decoded ({getattr(error, 'error_string', error)})") from None


def padded(samples: NDArray[np.float32], multiple_seconds: float | None) -> NDArray[np.float32]:
    """Pad (N,) with silence at the end, up to the next multiple of `multiple_seconds`; None: no padding."""
    if multiple_seconds is None:
        return samples
    block = round(multiple_seconds * SAMPLE_RATE)
    return np.pad(samples, (0, -len(samples) % block))
