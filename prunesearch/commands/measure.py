"""Latency, memory and file size of candidates on this machine, against the unpruned system without LoRA.

A candidate and the unpruned system are run alternately on the same recordings, so that the machine's temperature and other
load affect both alike. Ratios are taken within a run; the medians over runs are reported.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from prunesearch.asr.assembly import StudyModels, assemble, recorded_dtype, require_weights, weights_file
from prunesearch.asr.recognizer import Recognizer
from prunesearch.asr.timing import Recordings, compared, measure_in_turns
from prunesearch.commands.export import choose_record
from prunesearch.speech.audio import read_audio
from prunesearch.speech.corpus import checked_corpus
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.study.front import baseline_and_front_systems, complete_records
from prunesearch.study.measurement import MeasuredSystem, Measurement, SystemMetrics
from prunesearch.study.progress import NullListener, ProgressListener
from prunesearch.study.record import RunRecord
from prunesearch.training.device import device_name
from prunesearch.training.repair import keep_maps_of
from prunesearch.workers.final_test import fetch_records

UNPRUNED = Candidate()


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
        systems.append(compared(record.candidate.key, record.name, own, unpruned_beside))
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
        systems=(compared(unpruned.candidate.key, unpruned.name, of_unpruned, of_unpruned), *systems),
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


def _read_recordings(config: StudyConfig, most: int, window: float, listener: ProgressListener) -> Recordings:
    utterances = checked_corpus(config, "dev", listener.progress, window).utterances[:most]
    samples = [read_audio(u.audio) for u in utterances]
    return Recordings.of(samples, [u.language for u in utterances], config.decoding.batch_size)


def _measure_alternately(
    loaded: StudyModels,
    config: StudyConfig,
    records: Sequence[RunRecord],
    recordings: Recordings,
    runs: int,
    listener: ProgressListener,
) -> list[list[SystemMetrics]]:
    """Each record's metrics, run by run."""
    label = f"measuring {records[-1].name or records[-1].candidate.key}"
    systems = [partial(_system_on_device, loaded, config, record) for record in records]
    return measure_in_turns(systems, recordings, runs, partial(listener.progress, label))


@contextmanager
def _system_on_device(loaded: StudyModels, config: StudyConfig, record: RunRecord) -> Iterator[Recognizer]:
    """The record's system. Its encoder leaves the device at the end, so that the next system's memory peak is its own."""
    asr = assemble(config, record, loaded)
    try:
        yield asr
    finally:
        loaded.system.detach(asr.reader)
        asr.encoder.to("cpu")
