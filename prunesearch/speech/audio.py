"""Audio files -> mono samples at 16 kHz."""

from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 16_000


class AudioError(ValueError):
    """A recording cannot be used; the message names the file and the reason."""


def read_audio(path: Path) -> NDArray[np.float32]:
    """Samples in [-1, 1], (samples,): channels averaged, resampled to 16 kHz.

    Raises AudioError when the file is missing, empty, no audio, or holds values that are not finite.
    """
    if not path.is_file():
        raise AudioError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be decoded ({error})") from None
    if len(samples) == 0:
        raise AudioError(f"{path}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds samples that are not finite")
    mono = samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32)


def seconds_of(path: Path) -> float:
    """The duration that the file's header states. Raises AudioError as `read_audio` does."""
    try:
        return float(soundfile.info(path).duration)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise AudioError(f"{path}: cannot be decoded ({error})") from None


def padded(samples: NDArray[np.float32], multiple_seconds: float | None) -> NDArray[np.float32]:
    """The samples with silence behind them, up to the next multiple of so many seconds."""
    if multiple_seconds is None:
        return samples
    block = round(multiple_seconds * SAMPLE_RATE)
    return np.pad(samples, (0, -len(samples) % block))
