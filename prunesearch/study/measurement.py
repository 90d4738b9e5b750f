"""Speed, memory and size of systems on one machine, as measured by `prunesearch measure`."""

from dataclasses import dataclass
from pathlib import Path

from prunesearch.study.files import read_json


@dataclass(frozen=True)
class SystemMetrics:
    """Speed, memory and size of one system. Seconds and tokens are means per recording."""

    encoder_seconds: float  # encoder only, one recording at a time
    batch_encoder_seconds: float  # encoder only, in batches
    end_to_end_seconds: float  # from samples to text, one recording at a time
    real_time_factor: float  # from samples to text, in batches: seconds of computing per second of audio
    new_tokens: float  # tokens that the LLM generated
    peak_memory_bytes: int | None  # from samples to text, weights included; None on a CPU, whose peak cannot be reset
    parameter_bytes: int  # encoder, projector, LoRA and LLM, in the precision that they are held in
    file_bytes: int  # tensors that an export writes for encoder, projector and LoRA


@dataclass(frozen=True)
class Ratios:
    """A system's metrics divided by those of the unpruned system."""

    encoder: float
    batch_encoder: float
    end_to_end: float
    batch_end_to_end: float
    new_tokens: float
    peak_memory: float | None
    parameters: float
    file: float


@dataclass(frozen=True)
class MeasuredSystem:
    """One system beside the unpruned one, which was measured again in the same runs.

    `figures`, `unpruned` and `ratios` are medians over runs; a ratio is taken within a run. `lowest` and `highest` are the
    range of the ratios over runs: if it is wide, the machine was busy with other work, or there were too few runs.
    """

    candidate: str  # its key
    name: str | None  # of a baseline
    figures: SystemMetrics  # of this system
    unpruned: SystemMetrics
    ratios: Ratios
    lowest: Ratios
    highest: Ratios


@dataclass(frozen=True)
class Measurement:
    """All systems that were measured on one machine, the unpruned one first.

    `measure.json` and the output of `--json` are this object, with the names of its fields as keys.
    """

    study: str
    device: str
    torch: str  # its version
    dtype: str
    threads: int
    turns: int  # number of timed runs per system; the key keeps its older name
    utterances: int
    audio_seconds: float
    batch_size: int
    systems: tuple[MeasuredSystem, ...]


def read_measurement(path: Path) -> Measurement | None:
    """Read a study's `run/measure.json`. None if nothing was measured yet. Raises StudyError for a damaged file."""
    if not path.exists():
        return None
    return read_json(path, Measurement, "restore it from a copy, or delete it: `prunesearch measure` writes it again")
