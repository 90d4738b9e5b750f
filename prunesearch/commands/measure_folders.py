"""Latency, memory and file size of an exported system, beside another one, on a machine that has no study."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from prunesearch.asr.auto import AutoAsr
from prunesearch.asr.parts import SETTINGS as SLAM_SETTINGS
from prunesearch.asr.recognizer import Recognizer
from prunesearch.asr.timing import Recordings, compared, measure_in_turns
from prunesearch.speech.audio import SAMPLE_RATE, AudioError, read_audio
from prunesearch.speech.tables import read_manifest
from prunesearch.study.errors import StudyError
from prunesearch.study.measurement import Measurement
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.training.device import device_name


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a system, and not a study."""
    return not (folder / "study.toml").is_file() and any((folder / name).is_file() for name in (SLAM_SETTINGS, "config.json"))


def measure_folders(
    folder: str | Path,
    manifest: Path,
    against: str | Path | None = None,
    runs: int = 5,
    utterances: int = 16,
    listener: ProgressListener | None = None,
) -> Measurement:
    """Measure an exported system on the first recordings of a manifest, in turns with the one that it is compared with.

    `against`: an export or a checkpoint, such as of the model before it was pruned; without it, ratios are 1. Both stay in
    memory, so that a GPU's peak is of both together. Raises StudyError for errors in the user's input.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    listener = listener or NullListener()
    names = [str(against), str(folder)] if against is not None else [str(folder)]
    systems = [AutoAsr.from_pretrained(name) for name in names]
    recordings = _read(manifest, utterances, systems)
    progress = partial(listener.progress, f"measuring {Path(folder).name}")
    measured = measure_in_turns([partial(_opened, asr) for asr in systems], recordings, runs, progress)
    base, own = measured[0], measured[-1]
    first = compared(Path(names[0]).name, None, base, base)
    return Measurement(
        study=Path(folder).name,
        device=device_name(systems[-1].device),
        torch=torch.__version__,
        dtype=systems[-1].settings.dtype,
        threads=torch.get_num_threads(),
        turns=runs,
        utterances=len(recordings.alone),
        audio_seconds=round(recordings.seconds, 3),
        batch_size=systems[-1].settings.decoding.batch_size,
        systems=(first,) if against is None else (first, compared(Path(folder).name, None, own, base)),
    )


@contextmanager
def _opened(asr: Recognizer) -> Iterator[Recognizer]:
    yield asr


def _read(manifest: Path, most: int, systems: list[Recognizer]) -> Recordings:
    """Raises StudyError for a manifest or a recording that cannot be used."""
    if not manifest.is_file():
        raise StudyError([f"--data: there is no file {manifest}"])
    rows = read_manifest(manifest, transcribed=False)[:most]
    if wrong := [f"{row.where}: {row.problem}" for row in rows if row.problem]:
        raise StudyError(wrong)
    window, samples, problems = min(asr.window_seconds for asr in systems), [], []
    for row in rows:
        try:
            samples.append(read_audio(row.audio))
        except AudioError as error:
            problems.append(f"{row.where}: {error}")
            continue
        if (seconds := len(samples[-1]) / SAMPLE_RATE) > window:
            problems.append(f"{row.where}: lasts {seconds:.1f} s, longer than the window of {window:g} s: leave it out")
    if problems or not samples:
        raise StudyError(problems or [f"--data: {manifest} has no line"])
    return Recordings.of(samples, [row.language for row in rows], systems[-1].settings.decoding.batch_size)
