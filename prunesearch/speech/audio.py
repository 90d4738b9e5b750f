"""Read recordings as mono samples at 16 kHz."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from prunesearch.speech.containers import layout_of, without_tags
from prunesearch.speech.layout import AudioFile, Layout

SAMPLE_RATE = 16_000
SHORTEST = SAMPLE_RATE // 40  # samples: one analysis window of Whisper's log-mels, 25 ms
SLACK_SECONDS = 0.02  # an excess that no word fits in: some writers count the header's own bytes as samples
CANCELLED = 0.01  # power of the channels' mean to mean power of the channels: below this, they cancel each other
BLOCK = 1 << 20  # frames that are read at once
UNLIKELY_FRAMES = 1 << 40  # what libsndfile gives for an unknown length is larger
APPLE_DOUBLE = b"\0\5\x16\7"
RESTORE = "copy the file again; if it is whole, `ffmpeg -i OLD -c copy NEW` writes a header that fits it"


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


@dataclass(frozen=True)
class DecodedAudio:
    """samples: (N,) in [-1, 1], mono, at 16 kHz.

    end_is_known: whether a recording that was cut off would have been noticed. Some formats announce neither a length nor an
    end, and some writers leave the length out.
    """

    samples: NDArray[np.float32]
    end_is_known: bool


class _Stream(soundfile.SoundFile):
    """A file to be read to its end, block by block: soundfile would stop at the announced length, and does not read formats
    without a seek operation as a whole."""

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class _Frames:
    """What libsndfile decoded: (frames, channels), what it announced, and the error that it stopped at."""

    values: NDArray[np.float32]
    rate: int
    announced: int
    error: str | None = None

    @property
    def seconds(self) -> float:
        return len(self.values) / self.rate


def display_name(recording: Recording | str) -> str:
    """The recording's name for messages: bytes of a file name that are not UTF-8 are shown as escapes."""
    if isinstance(recording, Cell):
        return str(recording)
    return os.fsencode(recording).decode("utf-8", "backslashreplace")


def _read_bytes(recording: Recording) -> bytes:
    """Raises AudioError when there is no such recording."""
    if isinstance(recording, Cell):
        cell = recording.dataset[recording.row][recording.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise AudioError(f"{recording}: holds no recording")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        recording = Path(cell["path"])
    name = display_name(recording)
    try:
        return recording.read_bytes()
    except FileNotFoundError:
        raise AudioError(f"{name}: there is no such file") from None
    except IsADirectoryError:
        raise AudioError(f"{name}: is a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


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
    """The samples of `decode_audio`. Raises AudioError as it does."""
    return decode_audio(recording).samples


def decode_audio(recording: Recording) -> DecodedAudio:
    """A recording as mono samples at 16 kHz. The format is detected from the content, not from the file's name.

    A recording is decoded to its end, whatever its header says, and compared with what the header announces. Channels are
    averaged; of channels that cancel each other, the loudest one is read.
    Raises AudioError when the recording is missing, empty, silent, cut off, shorter than 25 ms, not audio, or has values that
    are not finite.
    """
    name = display_name(recording)
    file = AudioFile(without_tags(_read_bytes(recording)))
    if file.size == 0:
        raise AudioError(f"{name}: the file is empty")
    if file.at(0, 4) == APPLE_DOUBLE:
        raise AudioError(f"{name}: holds what macOS stores beside a file (AppleDouble), not audio; the file can be deleted")
    layout = layout_of(file)
    streams = _decoded_parts(file, layout, name)
    _require_all(streams, layout, name)
    samples = np.concatenate([_mono_16_khz(stream) for stream in streams])
    _require_usable(samples, name)
    if not samples.any():
        raise AudioError(f"{name}: holds nothing but silence")
    return DecodedAudio(samples, layout.end_is_known)


def _decoded_parts(file: AudioFile, layout: Layout, name: str) -> list[_Frames]:
    """Raises AudioError for a part that cannot be opened."""
    try:
        return [_decode(content) for content in ([p.of(file) for p in layout.parts] or [file.content])]
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        if layout.excess > 1:
            raise AudioError(f"{name}: is cut off: {100 / layout.excess:.0f} % of its audio is there; {RESTORE}") from None
        if layout.problem:
            raise AudioError(f"{name}: is cut off or damaged ({layout.problem}); {RESTORE}") from None
        raise AudioError(f"{name}: cannot be decoded ({getattr(error, 'error_string', error)})") from None


def _decode(content: bytes) -> _Frames:
    """All frames of a file in memory. An error behind its header is kept beside the frames before it."""
    blocks: list[NDArray[np.float32]] = []
    found = None
    with _Stream(io.BytesIO(content)) as file:
        size = min(max(file.frames, SAMPLE_RATE), BLOCK)
        try:
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                blocks.append(block)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            found = str(getattr(error, "error_string", error)).strip(" .")
        values = np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)
        return _Frames(values, file.samplerate, file.frames, found)


def _require_all(streams: Sequence[_Frames], layout: Layout, name: str) -> None:
    """Raises AudioError where less was decoded than was announced, and where decoding ended with an error."""
    seconds = sum(stream.seconds for stream in streams)
    announced = seconds * layout.excess
    if layout.end_is_known or layout.parts:  # else, libsndfile guesses
        announced = max(announced, sum(stream.announced / stream.rate for stream in streams))
    if layout.frames is not None:
        announced = max(announced, layout.frames / streams[0].rate)
    error = layout.problem or next((stream.error for stream in streams if stream.error), None)
    reason = f" ({error})" if error else ""
    if announced - seconds > SLACK_SECONDS:
        raise AudioError(f"{name}: is cut off or damaged after {seconds:.2f} of {announced:.2f} s{reason}; {RESTORE}")
    if error:
        raise AudioError(f"{name}: is cut off or damaged after {seconds:.2f} s{reason}; {RESTORE}")


def _mono_16_khz(stream: _Frames) -> NDArray[np.float32]:
    """The average of the channels or, where they cancel each other, the loudest channel."""
    with np.errstate(invalid="ignore"):  # values that are not finite are named later
        mono = stream.values.mean(axis=1)
    if stream.values.shape[1] > 1:
        loudness = np.square(stream.values, dtype=np.float32).mean(axis=0)
        if np.square(mono).mean() < CANCELLED * loudness.mean():
            mono = stream.values[:, loudness.argmax()].copy()
    return mono if stream.rate == SAMPLE_RATE else soxr.resample(mono, stream.rate, SAMPLE_RATE).astype(np.float32)


def checked_samples(samples: NDArray[Any], name: str = "samples") -> NDArray[np.float32]:
    """Samples at 16 kHz that a caller gives instead of a file, as float32.

    Raises AudioError where they are not (N,) of floating point, are shorter than 25 ms, or are not finite.
    """
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        shape = f"{samples.dtype} of shape {samples.shape}"
        raise AudioError(f"{name}: must be one channel of floating-point samples in [-1, 1], shape (N,), got {shape}")
    samples = samples.astype(np.float32, copy=False)
    _require_usable(samples, name)
    return samples


def _require_usable(samples: NDArray[np.float32], name: str) -> None:
    """Raises AudioError for samples that no encoder can take."""
    if len(samples) == 0:
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds samples that are not finite")
    if len(samples) < SHORTEST:
        milliseconds = 1000 * len(samples) / SAMPLE_RATE
        raise AudioError(f"{name}: must last at least {1000 * SHORTEST / SAMPLE_RATE:g} ms, got {milliseconds:.2g} ms")


def seconds_of(recording: Recording) -> float:
    """The duration in the header; that of the decoded samples where the header does not tell it.

    Raises AudioError where there is no readable header.
    """
    try:
        opened = (
            recording.open("rb") if isinstance(recording, Path) and recording.is_file() else io.BytesIO(_read_bytes(recording))
        )
        with opened as source, _Stream(source) as file:
            if 0 < file.frames < UNLIKELY_FRAMES and file.format != "MP3":  # of MP3, libsndfile guesses
                return float(file.frames / file.samplerate)
    except (soundfile.LibsndfileError, RuntimeError, TypeError, OSError):
        pass  # decoding tells why
    return len(read_audio(recording)) / SAMPLE_RATE


def padded(samples: NDArray[np.float32], multiple_seconds: float | None) -> NDArray[np.float32]:
    """Pad (N,) with silence at the end, up to the next multiple of `multiple_seconds`; None: no padding."""
    if multiple_seconds is None:
        return samples
    block = round(multiple_seconds * SAMPLE_RATE)
    return np.pad(samples, (0, -len(samples) % block))
