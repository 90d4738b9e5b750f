"""Time to read 1,000 recordings of 5 s in each of four formats: our reader, and soundfile alone.

    python benchmarks/reading.py [--files 1000] [--seconds 5]

Our reader decodes to the end of each file, compares the length with the header, and checks the samples. soundfile alone reads
as many frames as the header announces. One thread; the files are in the cache of the operating system.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from prunesearch.speech.audio import SAMPLE_RATE, read_audio

FORMATS = {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "OPUS", "MP3": "MPEG_LAYER_III"}


def soundfile_alone(path: Path) -> None:
    soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)


def write(folder: Path, container: str, files: int, seconds: float) -> list[Path]:
    """A glide over noise, another one in each file."""
    rng, t = np.random.default_rng(0), np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    paths = []
    for i in range(files):
        samples = 0.3 * np.sin(2 * np.pi * (150 + i % 100 + 60 * t) * t) + rng.normal(0, 0.02, len(t))
        paths.append(folder / f"{container}-{i}")
        soundfile.write(paths[-1], samples, SAMPLE_RATE, format=container, subtype=FORMATS[container])
    return paths


def seconds_for(read: Callable[[Path], object], paths: list[Path]) -> float:
    begin = time.perf_counter()
    for path in paths:
        read(path)
    return time.perf_counter() - begin


def main(files: int, seconds: float) -> None:
    table = Table(title=f"Seconds for {files} files of {seconds:g} s")
    for column in ("format", "MB", "soundfile alone", "our reader", "ratio"):
        table.add_column(column, justify="right")
    for container, subtype in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = write(Path(folder), container, files, seconds)
            size = sum(path.stat().st_size for path in paths) / 1e6
            alone, ours = (min(seconds_for(read, paths) for _ in range(2)) for read in (soundfile_alone, read_audio))
            table.add_row(f"{container} {subtype}", f"{size:.1f}", f"{alone:.2f}", f"{ours:.2f}", f"{ours / alone:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    main(**vars(parser.parse_args()))
