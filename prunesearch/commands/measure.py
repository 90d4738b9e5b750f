"""What a candidate takes where it runs: latency, memory and file size, against the unpruned system without LoRA.

The two are measured in turns, on the same recordings, so that what else the machine does, and how warm it is, meets both
alike. A ratio is taken within a turn, and the median over turns is what is told.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prunesearch.speech.audio import SAMPLE_RATE, read_audio
from prunesearch.speech.corpus import checked_corpus
from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.front import complete_records, pareto_front, pooled_by_system
from prunesearch.study.measurement import MeasuredSystem, Measurement, Ratios, SystemMetrics
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import RunRecord, write_atomically

if TYPE_CHECKING:
    import torch

    from prunesearch.asr.slam_asr import Samples, SlamAsr
    from prunesearch.commands.export import Base

UNPRUNED = Candidate()


@dataclass(frozen=True)
class _Recordings:
    """What is listened to: recordings by themselves, and in the batches that the study decodes in."""

    alone: list[list["Samples"]]
    batches: list[list["Samples"]]
    seconds: float


def measure(
    source: str | Path,
    candidates: Sequence[str] = (),
    turns: int = 5,
    utterances: int = 16,
    listener: ProgressListener | None = None,
) -> Measurement:
    """Measure candidates, by key (default: the front and the baselines), on the first `utterances` of dev; the study's
    `run/measure.json` holds the outcome, too.

    All compute in what the unpruned system was trained in. Each is measured `turns` times, after one turn that is not counted.
    Raises StudyError for the user's mistakes.
    """
    import torch
    from transformers.utils import logging

    from prunesearch.commands.export import Base, dtype_of
    from prunesearch.training.device import device_name

    logging.disable_progress_bar()  # the listener tells of progress
    listener = listener or NullListener()
    config = load_study(source)
    unpruned, others = _wanted(config, candidates, listener)
    recordings = _recordings(config, utterances, listener)
    base = Base.load(config, dtype_of(unpruned))

    systems: list[MeasuredSystem] = []
    reference: list[SystemMetrics] = []
    for done, record in enumerate(others, 1):
        beside, own = _in_turns(base, config, [unpruned, record], recordings, turns, listener)
        systems.append(_compared(record, own, beside))
        reference += beside
        listener.finished(record, done, len(others))
    if not others:
        (reference,) = _in_turns(base, config, [unpruned], recordings, turns, listener)
    found = Measurement(
        study=config.name,
        device=device_name(base.device),
        torch=torch.__version__,
        dtype=base.dtype,
        threads=torch.get_num_threads(),
        turns=turns,
        utterances=len(recordings.alone),
        audio_seconds=round(recordings.seconds, 3),
        batch_size=config.decoding.batch_size,
        systems=(_compared(unpruned, reference, reference), *systems),
    )
    write_atomically(config.run_folder / "measure.json", json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")
    return found


def _wanted(config: StudyConfig, keys: Sequence[str], listener: ProgressListener) -> tuple[RunRecord, list[RunRecord]]:
    """The unpruned system's record, and those of the others to be measured. Raises StudyError."""
    from prunesearch.commands.export import chosen, require_weights, weights_file

    complete = complete_records(config)
    unpruned = next((r for r in complete if r.candidate == UNPRUNED), None)
    asked = [chosen(config, key) for key in dict.fromkeys(keys)]
    if unpruned is None:
        raise StudyError(
            [f"unpruned, which all are measured against, is not complete yet: `prunesearch launch {config.source}`"]
        )
    for record in [unpruned, *asked]:
        require_weights(config, record)
    others = asked or _front_and_baselines(config, complete)
    there = [r for r in others if weights_file(config, r).exists()]
    if away := [r.candidate.key for r in others if r not in there]:
        listener.note(f"left out, for their weights are not there: {', '.join(away)}")
    return unpruned, [r for r in there if r.candidate != UNPRUNED]


def _front_and_baselines(config: StudyConfig, complete: Sequence[RunRecord]) -> list[RunRecord]:
    """The first complete training of each."""
    front = pareto_front(pooled_by_system(complete), config.search.params_objective, config.search.max_worst_group_wer)
    named = baselines(complete[0].encoder_layers, config.search.baseline_lora_rank)
    systems = dict.fromkeys([*named.values(), *(r.candidate.system for r in front)])
    first = {r.candidate.system: r for r in sorted(complete, key=lambda r: -r.repeat)}
    return [first[system] for system in systems if system in first]


def _recordings(config: StudyConfig, most: int, listener: ProgressListener) -> _Recordings:
    from prunesearch.training.batches import by_length

    samples = [read_audio(u.audio) for u in checked_corpus(config, "dev", listener.progress).utterances[:most]]
    lengths = [len(s) for s in samples]
    batches = [[samples[i] for i in batch] for batch in by_length(lengths, config.decoding.batch_size)]
    return _Recordings([[s] for s in samples], batches, sum(lengths) / SAMPLE_RATE)


def _in_turns(
    base: "Base",
    config: StudyConfig,
    records: Sequence[RunRecord],
    recordings: _Recordings,
    turns: int,
    listener: ProgressListener,
) -> list[list[SystemMetrics]]:
    """Each record's figures, turn by turn."""
    taken: list[list[SystemMetrics]] = [[] for _ in records]
    for turn in range(turns + 1):
        listener.progress(f"measuring {records[-1].name or records[-1].candidate.key}", turn, turns + 1)
        for record, figures in zip(records, taken, strict=True):
            figures.append(_listened(base, config, record, recordings))
    return [figures[1:] for figures in taken]  # kernels are chosen, and memory is fetched, in the first


def _listened(base: "Base", config: StudyConfig, record: RunRecord, recordings: _Recordings) -> SystemMetrics:
    """One turn of one system."""
    from prunesearch.training.device import forget_peak_memory, peak_memory_bytes

    device, count = base.device, len(recordings.alone)
    with _seated(base, config, record) as asr:
        asr.hear(recordings.alone[0])  # the first time is slow, for what was just put together
        encoder_seconds = _encoder_seconds(asr, recordings.alone) / count
        batch_encoder_seconds = _encoder_seconds(asr, recordings.batches) / count
        forget_peak_memory(device)
        end_to_end_seconds, heard = _timed(device, asr.hear, recordings.alone)
        batch_seconds, _ = _timed(device, asr.hear, recordings.batches)
        return SystemMetrics(
            encoder_seconds=encoder_seconds,
            batch_encoder_seconds=batch_encoder_seconds,
            end_to_end_seconds=end_to_end_seconds / count,
            real_time_factor=batch_seconds / recordings.seconds,
            new_tokens=sum(written.new_tokens for (written,) in heard) / count,
            peak_memory_bytes=peak_memory_bytes(device) if device.type == "cuda" else None,
            parameter_bytes=parameter_bytes(asr),
            file_bytes=file_bytes(asr),
        )


@contextmanager
def _seated(base: "Base", config: StudyConfig, record: RunRecord) -> Iterator["SlamAsr"]:
    """The record's system on the device, and no layer that only others have: the peak is to be its own."""
    from prunesearch.commands.export import put_together
    from prunesearch.model.llm import lora

    with lora(base.llm, record.lora_rank, config.llm, record.seed) as model:
        asr = put_together(config, record, base, model)
        try:
            yield asr
        finally:
            asr.encoder.to("cpu")


def _encoder_seconds(asr: "SlamAsr", batches: Sequence[Sequence["Samples"]]) -> float:
    def encode(mels: Any) -> None:  # states are dropped: they would pile up on the device
        asr.encode(*mels)

    seconds, _ = _timed(asr.device, encode, map(asr.log_mels, batches))
    return seconds


def _timed(device: "torch.device", work: Callable[[Any], Any], items: Iterable[Any]) -> tuple[float, list[Any]]:
    """Seconds for the items, one after the other, and what became of each. How an item comes about is not counted."""
    seconds, results = 0.0, []
    for item in items:
        begin = _now(device)
        results.append(work(item))
        seconds += _now(device) - begin
    return seconds, results


def _now(device: "torch.device") -> float:
    """Seconds, when the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def parameter_bytes(asr: "SlamAsr") -> int:
    """What the whole system's parameters take, each in its own precision; tied weights count once."""
    modules = (asr.encoder, asr.slam.projector, asr.slam.model)
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def file_bytes(asr: "SlamAsr") -> int:
    """What the tensors take that `save_pretrained` writes for encoder, projector and LoRA; a header comes on top."""
    from prunesearch.model.llm import lora_parameters

    written = (asr.encoder.state_dict(), asr.slam.projector.state_dict(), lora_parameters(asr.slam.model))
    return sum(tensor.numel() * tensor.element_size() for tensors in written for tensor in tensors.values())


def _compared(record: RunRecord, own: Sequence[SystemMetrics], unpruned: Sequence[SystemMetrics]) -> MeasuredSystem:
    median_ratios, lowest, highest = (_ratios(own, unpruned, over) for over in (median, min, max))
    return MeasuredSystem(record.candidate.key, record.name, _medians(own), _medians(unpruned), median_ratios, lowest, highest)


def _ratios(own: Sequence[SystemMetrics], unpruned: Sequence[SystemMetrics], over: Callable[[list[float]], float]) -> Ratios:
    """Each turn's ratios, and of them the median, say."""

    def ratio(field: str) -> float:
        return over([getattr(a, field) / getattr(b, field) for a, b in zip(own, unpruned, strict=True)])

    return Ratios(
        encoder=ratio("encoder_seconds"),
        batch_encoder=ratio("batch_encoder_seconds"),
        end_to_end=ratio("end_to_end_seconds"),
        batch_end_to_end=ratio("real_time_factor"),
        new_tokens=ratio("new_tokens"),
        peak_memory=None if own[0].peak_memory_bytes is None else ratio("peak_memory_bytes"),
        parameters=ratio("parameter_bytes"),
        file=ratio("file_bytes"),
    )


def _medians(turns: Sequence[SystemMetrics]) -> SystemMetrics:
    """Field by field; bytes stay whole, and what is unknown unknown."""
    times = {f.name: median(getattr(t, f.name) for t in turns) for f in fields(SystemMetrics) if not f.name.endswith("_bytes")}
    peaks = [t.peak_memory_bytes for t in turns if t.peak_memory_bytes is not None]
    return replace(turns[0], **times, peak_memory_bytes=int(median(peaks)) if peaks else None)
