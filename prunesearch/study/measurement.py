"""What candidates take where they run, as `prunesearch measure` found it on some machine."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter


@dataclass(frozen=True)
class SystemMetrics:
    """What one system takes. Seconds are a recording's, on average."""

    encoder_seconds: float  # the encoder alone, one recording at a time
    batch_encoder_seconds: float  # the encoder alone, a recording's share of a batch
    end_to_end_seconds: float  # from samples to text, one recording at a time
    real_time_factor: float  # from samples to text in batches: seconds of computing per second of audio
    new_tokens: float  # that the LLM wrote, one recording at a time
    peak_memory_bytes: int | None  # from samples to text, weights included; None on a CPU, where it cannot be counted anew
    parameter_bytes: int  # encoder, projector, LoRA and LLM, as they are held
    file_bytes: int  # of the tensors that an export writes for the speech side: encoder, projector and LoRA


@dataclass(frozen=True)
class Ratios:
    """A system's figures over the unpruned system's."""

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
    """Medians over turns: of the system's figures, of the unpruned system's in the same turns, of the turns' ratios. Of these,
    the lowest and the highest too: far apart, they say that the machine had other things to do, or turns were too few."""

    candidate: str  # its key
    name: str | None  # a baseline's
    figures: SystemMetrics
    unpruned: SystemMetrics
    ratios: Ratios
    lowest: Ratios
    highest: Ratios


@dataclass(frozen=True)
class Measurement:
    """Systems by what they take on one machine, the unpruned one first.

    `measure.json`, and what `--json` prints, is an object of these fields: `systems` a list of `MeasuredSystem`, in which
    `figures` and `unpruned` are `Figures`, and `ratios`, `lowest` and `highest` are `Ratios`.
    """

    study: str
    device: str
    torch: str  # its version
    dtype: str
    threads: int
    turns: int
    utterances: int
    audio_seconds: float
    batch_size: int
    systems: tuple[MeasuredSystem, ...]


def read_measurement(path: Path) -> Measurement | None:
    """The study's `run/measure.json`; None where nothing was measured."""
    return TypeAdapter(Measurement).validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
