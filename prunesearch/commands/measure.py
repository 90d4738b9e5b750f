"""Latency, memory and file size of candidates on this machine, against the unpruned system without LoRA.

A candidate and the unpruned system are run alternately on the same recordings, so that the machine's temperature and other
load affect both alike. Ratios are taken within a run; the medians over runs are reported.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch
from transformers.utils import logging

from prunesearch.asr.assembly import StudyModels, assemble, recorded_dtype, require_weights, weights_file
from prunesearch.asr.recognizer import Recognizer, Samples
from prunesearch.commands.export import choose_record
from prunesearch.model.llm import lora_parameters
from prunesearch.speech.audio import SAMPLE_RATE, read_audio
from prunesearch.speech.corpus import checked_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.study.front import baseline_and_front_systems, complete_records
from prunesearch.study.measurement import MeasuredSystem, Measurement, Ratios, SystemMetrics
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.training.batches import by_length
from prunesearch.training.decode import Hypothesis
from prunesearch.training.device import device_name, peak_memory_bytes, reset_peak_memory
from prunesearch.training.repair import keep_maps_of
from prunesearch.workers.final_test import fetch_records

UNPRUNED = Candidate()

Batch = tuple[list[Samples], list[str | None]]
Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class _Recordings:
    """The recordings that every system transcribes, with their languages: one by one, and in the batches that the study decodes
    in.
    """

    alone: list[Batch]
    batches: list[Batch]
    seconds: float


def measure(
    source: str | Path,
    candidates: Sequence[str] = (),
    runs: int = 5,
    utterances: int = 16,
    listener: ProgressListener | None = None,
    storage: str | None = None,
) -> Measurement:
    """Measure candidates on the first `utterances` of dev, and write the result to the study's `run/measure.json`.

    `candidates`: keys; default is the front and the baselines. `runs`: timed runs per system, after one warm-up run. All
    systems compute in the dtype that the unpruned system was trained in. Raises StudyError for errors in the user's input.
    """
    logging.disable_progress_bar()  # the listener shows progress
    listener = listener or NullListener()
    config = load_study(source)
    fetch_records(config, storage)
    unpruned, others = _records_to_measure(config, candidates, listener)
    keep_maps_of(config, [unpruned, *others])
    loaded = StudyModels.load(config, recorded_dtype(unpruned))
    recordings = _read_recordings(config, utterances, loaded.system.encoder.window_seconds, listener)

    systems: list[MeasuredSystem] = []
    of_unpruned: list[SystemMetrics] = []
    for done, record in enumerate(others, 1):
        unpruned_beside, own = _measure_alternately(loaded, config, [unpruned, record], recordings, runs, listener)
        systems.append(_compared(record, own, unpruned_beside))
        of_unpruned += unpruned_beside
        listener.finished(record, done, len(others))
    if not others:
        (of_unpruned,) = _measure_alternately(loaded, config, [unpruned], recordings, runs, listener)
    measurement = Measurement(
        study=config.name,
        device=device_name(loaded.device),
        torch=torch.__version__,
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        turns=runs,
        utterances=len(recordings.alone),
        audio_seconds=round(recordings.seconds, 3),
        batch_size=config.decoding.batch_size,
        systems=(_compared(unpruned, of_unpruned, of_unpruned), *systems),
    )
    write_atomically(config.run_folder / "measure.json", json.dumps(asdict(measurement), indent=1, ensure_ascii=False) + "\n")
    return measurement


def _records_to_measure(
    config: StudyConfig, keys: Sequence[str], listener: ProgressListener
) -> tuple[RunRecord, list[RunRecord]]:
    """The unpruned system's record, and the others'. Raises StudyError where one that was asked for cannot be measured."""
    complete = complete_records(config)
    unpruned = next((r for r in complete if r.candidate == UNPRUNED), None)
    asked = [choose_record(config, key) for key in dict.fromkeys(keys)]
    if unpruned is None:
        raise StudyError(
            [f"the baseline unpruned, which all are compared with, is not complete yet: `prunesearch launch {config.source}`"]
        )
    for record in [unpruned, *asked]:
        require_weights(config, record)
    others = asked or _front_and_baselines(config, complete)
    there = [r for r in others if weights_file(config, r).exists()]
    if missing := [r.candidate.key for r in others if r not in there]:
        listener.note(f"left out because their weights are missing: {', '.join(missing)}")
    return unpruned, [r for r in there if r.candidate != UNPRUNED]


def _front_and_baselines(config: StudyConfig, complete: Sequence[RunRecord]) -> list[RunRecord]:
    """The record of each system's first complete training; systems without one are left out."""
    first = {r.candidate.system: r for r in sorted(complete, key=lambda r: -r.repeat)}
    return [first[system] for system in baseline_and_front_systems(config, complete) if system in first]


def _read_recordings(config: StudyConfig, most: int, window: float, listener: ProgressListener) -> _Recordings:
    utterances = checked_corpus(config, "dev", listener.progress, window).utterances[:most]
    samples = [read_audio(u.audio) for u in utterances]
    lengths = [len(s) for s in samples]
    alone: list[Batch] = [([s], [u.language]) for s, u in zip(samples, utterances, strict=True)]
    batches = [
        ([samples[i] for i in batch], [utterances[i].language for i in batch])
        for batch in by_length(lengths, config.decoding.batch_size)
    ]
    return _Recordings(alone, batches, sum(lengths) / SAMPLE_RATE)


def _measure_alternately(
    loaded: StudyModels,
    config: StudyConfig,
    records: Sequence[RunRecord],
    recordings: _Recordings,
    runs: int,
    listener: ProgressListener,
) -> list[list[SystemMetrics]]:
    """Each record's metrics, run by run, without the warm-up run (in which kernels are chosen and memory is reserved)."""
    metrics: list[list[SystemMetrics]] = [[] for _ in records]
    for run in range(runs + 1):
        listener.progress(f"measuring {records[-1].name or records[-1].candidate.key}", run, runs + 1)
        for record, own in zip(records, metrics, strict=True):
            own.append(_measure_once(loaded, config, record, recordings))
    return [own[1:] for own in metrics]


def _measure_once(loaded: StudyModels, config: StudyConfig, record: RunRecord, recordings: _Recordings) -> SystemMetrics:
    """One run of one system."""
    device, count = loaded.device, len(recordings.alone)
    with _system_on_device(loaded, config, record) as asr:

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


@contextmanager
def _system_on_device(loaded: StudyModels, config: StudyConfig, record: RunRecord) -> Iterator[Recognizer]:
    """The record's system. Its encoder leaves the device at the end, so that the next system's memory peak is its own."""
    asr = assemble(config, record, loaded)
    try:
        yield asr
    finally:
        loaded.system.detach(asr.reader)
        asr.encoder.to("cpu")


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


def _compared(record: RunRecord, own: Sequence[SystemMetrics], unpruned: Sequence[SystemMetrics]) -> MeasuredSystem:
    """A system's metrics over runs, beside the unpruned system's in the same runs."""
    median_ratios, lowest, highest = (_ratios(own, unpruned, over) for over in (median, min, max))
    return MeasuredSystem(record.candidate.key, record.name, _medians(own), _medians(unpruned), median_ratios, lowest, highest)


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
