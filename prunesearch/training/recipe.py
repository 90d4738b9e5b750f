"""From a candidate to its record, top to bottom: prepare (prune and repair), fine-tune, score, write."""

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from prunesearch import __version__
from prunesearch.model.digest import hub_commits
from prunesearch.model.system import Reader
from prunesearch.study.candidate import Candidate
from prunesearch.study.interrupt import LeaseLost
from prunesearch.study.record import (
    TRAIN_AGAIN,
    WEIGHTS_FILE,
    HeldOutLoss,
    Parameters,
    RepairSummary,
    RunCost,
    Rung,
    RunRecord,
    SplitResult,
    WordErrors,
    read_record,
    record_folder,
    write_record,
    write_utterances,
)
from prunesearch.training.context import TrainingContext
from prunesearch.training.curve import LearningCurve
from prunesearch.training.device import device_name, peak_memory_bytes, reset_peak_memory
from prunesearch.training.finetune import (
    Diverged,
    FineTune,
    FineTuneProgress,
    FineTuneSettings,
    TrainingSet,
    restore,
    trainable,
)
from prunesearch.training.repair import keep_repaired_maps, repaired_encoder, start_of
from prunesearch.training.states import StateStore
from prunesearch.training.tensors import read_tensors, write_tensors


class TrialMonitor(Protocol):
    """What a training asks the study's trial. Only the main process asks."""

    @property
    def name(self) -> str | None:
        """The candidate's name, if it is a baseline."""

    def ends_at_rung(self, step: int, errors: WordErrors) -> bool:
        """Whether to end the trial with these dev errors after `step` steps. Raises LeaseLost."""

    def confirm(self) -> None:
        """Raises LeaseLost if another worker has the trial by now."""


@dataclass(frozen=True)
class Unmonitored:
    """The monitor of a candidate that is evaluated without a trial: it never ends early."""

    name: str | None = None

    def ends_at_rung(self, step: int, errors: WordErrors) -> bool:
        return False

    def confirm(self) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """A candidate's system, ready to be trained, and the encoder states that it is trained and scored on."""

    candidate: Candidate
    reader: Reader
    parameters: Parameters
    train: StateStore
    dev: StateStore | None  # of the main process, which decodes
    repair: RepairSummary | None
    repair_seconds: float
    encode_seconds: float


@dataclass
class Run:
    """The outcome of a fine-tune, filled in while it runs."""

    progress: FineTuneProgress
    state: Literal["complete", "pruned", "failed"] = "complete"
    reason: str | None = None
    dev: SplitResult | None = None  # of the last decoding
    decode_seconds: float = 0.0

    def fail_for_memory(self, error: torch.OutOfMemoryError) -> None:
        self.state = "failed"
        self.reason = f"out of memory with one utterance at a time ({str(error).splitlines()[0]})"


def train_and_score(context: TrainingContext, candidate: Candidate, monitor: TrialMonitor | None = None) -> RunRecord:
    """Train and score a candidate under the study's budget; write its record, utterances, learning curve and weights.

    A candidate that has a record already is not trained again; one whose training was interrupted continues from its
    checkpoint. A training that diverges is recorded as failed, one that ends at a rung as pruned. Every process of a group
    calls this; the main process decodes, decides and writes. If two workers finish the same candidate, the first record stays.
    Raises Interrupted and LeaseLost.
    """
    monitor = monitor or Unmonitored()
    if (record := _existing_record(context, candidate, monitor.name)) is not None:
        return record
    reset_peak_memory(context.device)
    begin = time.perf_counter()
    with prepare(context, candidate) as system:
        run = fine_tune(context, system, monitor)
        _confirm(context, monitor)
        if (record := _existing_record(context, candidate, monitor.name)) is not None:
            return record  # of another worker, which had the candidate in the meantime
        return write(context, system, run, monitor.name, trial_seconds=time.perf_counter() - begin)


@contextmanager
def prepare(context: TrainingContext, candidate: Candidate) -> Iterator[Prepared]:
    """Remove the layers, repair what is left, compute the encoder states, start the projector, and put LoRA on the LLM until
    the end.
    """
    group = context.group
    started = time.perf_counter()
    encoder, projector, repair = start_of(context, candidate)
    repair_seconds = time.perf_counter() - started
    with context.system.reader(projector, candidate.lora_rank, context.config.seed + candidate.repeat) as reader:
        started = time.perf_counter()
        train = context.encoded(encoder, "train", context.drawn(context.budget(candidate.repeat)))
        dev = context.encoded(encoder, "dev", context.used("dev")) if group.is_main_process else None
        seconds = time.perf_counter() - started
        parameters = context.system.parameters(encoder, reader)
        yield Prepared(candidate, reader, parameters, train, dev, repair, repair_seconds, seconds)


def fine_tune(context: TrainingContext, system: Prepared, monitor: TrialMonitor) -> Run:
    """Train from rung to rung, and score after each of them and at the end. Dev utterances are written each time."""
    config, budget = context.config, context.budget(system.candidate.repeat)
    folder = record_folder(context.records, system.candidate)
    label = monitor.name or system.candidate.key
    rungs = sorted({round(fraction * budget.steps) or 1 for fraction in config.training.rungs if budget.steps})
    with LearningCurve(folder, context, label, budget.steps) as curve:
        settings = FineTuneSettings(config.training, context.group, context.dtype, folder / "checkpoint.pt", curve.add)
        tuning = FineTune(system.reader, TrainingSet(system.train, context.targets), budget, settings)
        run = Run(tuning.progress)
        try:
            with tuning.checkpoint_when_interrupted():
                if not tuning.progress.step and not tuning.progress.rungs:
                    _score_start(context, system, run, monitor)
                for step in [r for r in rungs if r not in {passed for passed, _ in tuning.progress.rungs}]:
                    tuning.run_to(step)
                    score(context, system, run, monitor)
                    if _ends_here(context, run, step, monitor):
                        return run
                if budget.steps:
                    tuning.run_to(budget.steps)
                    tuning.interpolate()
                    score(context, system, run, monitor)
        except Diverged as error:
            run.state, run.reason = "failed", str(error)
        except torch.OutOfMemoryError as error:
            run.fail_for_memory(error)
    return run


def score(context: TrainingContext, system: Prepared, run: Run, monitor: TrialMonitor) -> None:
    """Decode dev in the main process; the others wait where they next need its decision."""
    if system.dev is None:
        return
    started = time.perf_counter()
    try:
        results = context.decode(system.reader, "dev", system.dev)
    except torch.OutOfMemoryError as error:
        run.fail_for_memory(error)
        return
    if context.group.size == 1:
        monitor.confirm()
    write_utterances(context.records, system.candidate, "dev", results)
    run.dev = SplitResult.of(results)
    run.decode_seconds += time.perf_counter() - started


def _score_start(context: TrainingContext, system: Prepared, run: Run, monitor: TrialMonitor) -> None:
    """Score the candidate before its first step, and keep the dev errors as a rung at step 0, which ends no trial."""
    if context.config.training.repair == "none" and context.config.training.steps:
        return
    score(context, system, run, monitor)
    if run.dev is not None:
        run.progress.rungs.append((0, run.dev.errors.model_dump()))


def _ends_here(context: TrainingContext, run: Run, step: int, monitor: TrialMonitor) -> bool:
    """Whether the run is over after this rung: the main process decides. All processes raise LeaseLost if it has lost the
    trial.
    """
    ends, lost = run.state == "failed", False
    if run.dev is not None and not ends:
        run.progress.rungs.append((step, run.dev.errors.model_dump()))
        try:
            ends = monitor.ends_at_rung(step, run.dev.errors)
        except LeaseLost:
            lost = True
    ends, lost = context.group.broadcast((ends, lost))
    if lost:
        raise LeaseLost
    if ends and run.state == "complete":
        run.state, run.reason = "pruned", f"dominated at step {step}"
    return ends


def _confirm(context: TrainingContext, monitor: TrialMonitor) -> None:
    """All processes raise LeaseLost if the main process has lost the trial."""
    lost = False
    if context.group.is_main_process:
        try:
            monitor.confirm()
        except LeaseLost:
            lost = True
    if context.group.broadcast(lost):
        raise LeaseLost


def _existing_record(context: TrainingContext, candidate: Candidate, name: str | None) -> RunRecord | None:
    """The candidate's record, if it has one. A record from before the candidate was a baseline gets the baseline's name."""
    record = context.group.broadcast(read_record(context.records, candidate, context.config.name))
    if record is not None and name and record.name is None:
        record = record.model_copy(update={"name": name})
        if context.group.is_main_process:
            write_record(context.records, record)
    return record


def write(context: TrainingContext, system: Prepared, run: Run, name: str | None, trial_seconds: float) -> RunRecord:
    """Write weights and record, and delete the checkpoint; returns the main process's record."""
    candidate, progress, config = system.candidate, run.progress, context.config
    folder = record_folder(context.records, candidate)
    record = RunRecord(
        study=config.name,
        name=name,
        encoder_layers=context.depth,
        removed_layers=candidate.removed_layers,
        lora_rank=candidate.lora_rank,
        repeat=candidate.repeat,
        seed=config.seed + candidate.repeat,
        state=run.state,
        reason=run.reason,
        steps=progress.step,
        dev=run.dev if run.state != "failed" else None,
        repair=system.repair,
        rungs=tuple(Rung(step=step, errors=WordErrors(**errors)) for step, errors in progress.rungs),
        interpolation=tuple(HeldOutLoss(share=share, loss=loss) for share, loss in (progress.interpolation or {}).items()),
        losses=tuple(progress.losses),
        parameters=system.parameters,
        cost=RunCost(
            train_seconds=round(progress.seconds, 2),
            encode_seconds=round(system.encode_seconds, 2),
            decode_seconds=round(run.decode_seconds, 2),
            repair_seconds=round(system.repair_seconds, 2),
            trial_seconds=round(trial_seconds, 2),
            peak_memory_bytes=peak_memory_bytes(context.device),
            micro_batch=progress.micro_batch,
        ),
        provenance=provenance(context),
    )
    record = context.group.broadcast(record)
    if context.group.is_main_process:
        if run.state != "failed":
            write_tensors(folder / WEIGHTS_FILE, trainable(system.reader))
        write_record(context.records, record)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def decode_test(context: TrainingContext, record: RunRecord) -> RunRecord:
    """Decode test with the record's trained weights; returns the record with its test errors. Test is decoded once only."""
    if record.test is not None:
        return record
    config, candidate = context.config, record.candidate
    encoder = repaired_encoder(context, candidate)
    keep_repaired_maps(context, candidate, encoder)
    with context.system.reader(context.fresh_projector(), record.lora_rank, config.seed) as reader:
        weights = trainable(reader)
        restore(weights, read_tensors(record_folder(context.records, candidate) / WEIGHTS_FILE, weights, TRAIN_AGAIN))
        reader.projector.eval()
        reader.model.eval()
        states = context.encoded(encoder, "test", context.used("test"))
        results = context.decode(reader, "test", states, beams=config.decoding.test_beams)
    write_utterances(context.records, candidate, "test", results)
    tested = record.model_copy(update={"test": SplitResult.of(results)})
    write_record(context.records, tested)
    return tested


@cache
def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except FileNotFoundError:  # git is not installed
        return {"commit": None, "dirty": None}


def provenance(context: TrainingContext) -> dict[str, Any]:
    """Date, code version, hardware, model digests and settings that a record was made with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prunesearch": __version__,
        **_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optuna", "jiwer")},
        "device": device_name(context.device),
        "threads": torch.get_num_threads(),
        "processes": context.group.size,
        "dtype": str(context.dtype).removeprefix("torch."),
        "models": context.model_digests,
        "hub_commits": hub_commits(context.config),
        "fingerprint": context.config.fingerprint(),
        "config": context.config.model_dump(mode="json", exclude={"storage"}),
    }
