"""Speed, memory and size of speech recognisers: several are run in turns on the same recordings.

So the machine's temperature and other load affect all alike. Ratios are taken within a run; the medians over runs are told.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch

from prunesearch.asr.recognizer import Recognizer, Samples
from prunesearch.model.llm import lora_parameters
from prunesearch.speech.audio import SAMPLE_RATE
from prunesearch.study.measurement import MeasuredSystem, Ratios, SystemMetrics
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Hypothesis
from prunesearch.training.device import peak_memory_bytes, reset_peak_memory

Batch = tuple[list[Samples], list[str | None]]
Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Recordings:
    """The recordings that every system transcribes, with their languages: one by one, and in the batches that the study decodes
    in.
    """

    alone: list[Batch]
    batches: list[Batch]
    seconds: float

    @classmethod
    def of(cls, samples: Sequence[Samples], languages: Sequence[str | None], batch_size: int) -> "Recordings":
        """The recordings alone, and in batches of at most `batch_size`."""
        pairs = list(zip(samples, languages, strict=True))
        together = [[pairs[i] for i in batch] for batch in by_length([len(s) for s in samples], batch_size)]
        batches = [([s for s, _ in batch], [language for _, language in batch]) for batch in together]
        return cls([([s], [language]) for s, language in pairs], batches, sum(map(len, samples)) / SAMPLE_RATE)


def measure_in_turns(
    systems: Sequence[Callable[[], AbstractContextManager[Recognizer]]],
    recordings: Recordings,
    runs: int,
    progress: Callable[[int, int], None],
) -> list[list[SystemMetrics]]:
    """Each system's metrics, run by run, without the warm-up run (in which kernels are chosen and memory is reserved).

    `systems`: open one of them at a time. `progress` gets the runs that are done, and their total.
    """
    metrics: list[list[SystemMetrics]] = [[] for _ in systems]
    for run in range(runs + 1):
        progress(run, runs + 1)
        for opened, own in zip(systems, metrics, strict=True):
            with opened() as asr:
                own.append(measure_once(asr, recordings))
    return [own[1:] for own in metrics]


def measure_once(asr: Recognizer, recordings: Recordings) -> SystemMetrics:
    """One run of one system."""
    device, count = asr.device, len(recordings.alone)

    def decode(batch: Batch) -> list[Hypothesis]:
        return asr.decode(batch[0], language=batch[1])

    decode(recordings.alone[0])  # the first call after assembly is slow
    encoder_seconds = _encoder_seconds(asr, recordings.alone) / count
    batch_encoder_seconds = _encoder_seconds(asr, recordings.batches) / count
    reset_peak_memory(device)
    end_to_end_seconds, hypotheses = _timed(device, decode, recordings.alone)
    batch_seconds, _ = _timed(device, decode, recordings.batches)
    return SystemMetrics(
        encoder_seconds=encoder_seconds,
        batch_encoder_seconds=batch_encoder_seconds,
        end_to_end_seconds=end_to_end_seconds / count,
        real_time_factor=batch_seconds / recordings.seconds,
        new_tokens=sum(hypothesis.new_tokens for (hypothesis,) in hypotheses) / count,
        peak_memory_bytes=peak_memory_bytes(device) if device.type == "cuda" else None,
        parameter_bytes=parameter_bytes(asr),
        file_bytes=file_bytes(asr),
    )


def _encoder_seconds(asr: Recognizer, batches: Sequence[Batch]) -> float:
    """Seconds that the encoder takes for the batches, without feature extraction."""
    seconds = 0.0
    for samples, _ in batches:
        features, frames = asr.log_mels(samples)
        begin = _now(asr.device)
        asr.encode(features, frames)
        seconds += _now(asr.device) - begin
    return seconds


def _timed(device: torch.device, function: Callable[[Input], Output], inputs: Iterable[Input]) -> tuple[float, list[Output]]:
    """Seconds of the calls, one after the other, and their outputs."""
    seconds, outputs = 0.0, []
    for value in inputs:
        begin = _now(device)
        outputs.append(function(value))
        seconds += _now(device) - begin
    return seconds, outputs


def _now(device: torch.device) -> float:
    """Time in seconds, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def parameter_bytes(asr: Recognizer) -> int:
    """Bytes of the whole system's parameters, each in its own precision; tied weights count once."""
    modules = torch.nn.ModuleList([asr.encoder.module, asr.reader.projector, asr.reader.model])
    return sum(p.numel() * p.element_size() for p in modules.parameters())


def file_bytes(asr: Recognizer) -> int:
    """Bytes of the tensors that `save_pretrained` writes for encoder, projector and LoRA, without file headers."""
    states = (asr.encoder.module.state_dict(), asr.reader.projector.state_dict(), lora_parameters(asr.reader.model))
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())


def compared(
    candidate: str, name: str | None, own: Sequence[SystemMetrics], unpruned: Sequence[SystemMetrics]
) -> MeasuredSystem:
    """A system's metrics over runs, beside the unpruned system's in the same runs."""
    median_ratios, lowest, highest = (_ratios(own, unpruned, over) for over in (median, min, max))
    return MeasuredSystem(candidate, name, _medians(own), _medians(unpruned), median_ratios, lowest, highest)


def _ratios(own: Sequence[SystemMetrics], unpruned: Sequence[SystemMetrics], over: Callable[[list[float]], float]) -> Ratios:
    """The ratios within each run, reduced `over` the runs (their median, for example)."""
    pairs = list(zip(own, unpruned, strict=True))
    names = {f.name for f in fields(SystemMetrics)} - ({"peak_memory_bytes"} if own[0].peak_memory_bytes is None else set())
    ratio = {name: over([getattr(a, name) / getattr(b, name) for a, b in pairs]) for name in names}
    return Ratios(
        encoder=ratio["encoder_seconds"],
        batch_encoder=ratio["batch_encoder_seconds"],
        end_to_end=ratio["end_to_end_seconds"],
        batch_end_to_end=ratio["real_time_factor"],
        new_tokens=ratio["new_tokens"],
        peak_memory=ratio.get("peak_memory_bytes"),
        parameters=ratio["parameter_bytes"],
        file=ratio["file_bytes"],
    )


def _medians(runs: Sequence[SystemMetrics]) -> SystemMetrics:
    """The median of each metric. Bytes of parameters and files are the same in every run; peak memory may be unknown."""
    times = {f.name: median(getattr(m, f.name) for m in runs) for f in fields(SystemMetrics) if not f.name.endswith("_bytes")}
    peaks = [m.peak_memory_bytes for m in runs if m.peak_memory_bytes is not None]
    return replace(runs[0], **times, peak_memory_bytes=int(median(peaks)) if peaks else None)
