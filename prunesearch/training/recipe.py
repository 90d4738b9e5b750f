"""From a candidate to its record, top to bottom: prune, encode, fine-tune, decode, score."""

import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from prunesearch import __version__
from prunesearch.model.llm import lora
from prunesearch.model.parameters import count_parameters
from prunesearch.model.slam import SpeechLlm
from prunesearch.study.candidate import Candidate
from prunesearch.study.interrupt import LeaseLost
from prunesearch.study.record import (
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
from prunesearch.training.context import TrainingContext, save_weights
from prunesearch.training.curve import LearningCurve
from prunesearch.training.decode import transcribe
from prunesearch.training.device import device_name, forget_peak_memory, peak_memory_bytes
from prunesearch.training.finetune import CurvePoint, Diverged, Progressed, Pruned, finetune, restore, trainable

OnRung = Callable[[int, WordErrors], bool]  # step, dev errors -> whether to stop here


def _keep_going(step: int, errors: WordErrors) -> bool:
    return False


def _nobody_else() -> None:
    pass


def evaluate(
    workshop: TrainingContext,
    candidate: Candidate,
    name: str | None = None,
    on_rung: OnRung = _keep_going,
    make_sure: Callable[[], None] = _nobody_else,
) -> RunRecord:
    """Train and score a candidate under the study's budget, and write its record, utterances, curve and weights.

    A candidate that has a record already is not trained again; one that was killed goes on from its checkpoint.
    A run whose loss is no longer finite is recorded as failed; one that `on_rung` stops, as pruned. Every process of a
    team calls this; the leader decodes, decides and writes. `make_sure` is called before the outcome is written, and raises
    LeaseLost where another worker has the candidate by now; of two outcomes, the first that is written stays.
    """
    config, records, team = workshop.config, workshop.config.run_folder / "records", workshop.team
    if finished := team.agree(read_record(records, candidate)):
        if name and finished.name is None:  # trained for another purpose, before it was anybody's baseline
            finished = finished.model_copy(update={"name": name})
            if team.leads:
                write_record(records, finished)
        return finished
    folder = record_folder(records, candidate)

    def still_ours() -> None:
        taken: LeaseLost | None = None
        if team.leads:
            try:
                make_sure()
            except LeaseLost as error:
                taken = error
        if team.agree(taken is not None):
            raise taken or LeaseLost

    dtype, dev = workshop.dtype, workshop.corpora["dev"]
    begin = time.perf_counter()
    forget_peak_memory(team.device)

    encoder = workshop.pruned_encoder(candidate)
    projector = workshop.start(workshop.fresh_projector(candidate.repeat))
    budget, seed = workshop.budget(candidate.repeat), config.seed + candidate.repeat
    with lora(workshop.llm, candidate.lora_rank, config.llm, seed) as model:
        slam = SpeechLlm(projector, workshop.llm, model)
        parameters = count_parameters(encoder, projector, model)

        started = time.perf_counter()
        train_states = workshop.encoded(encoder, "train", workshop.drawn(budget))
        dev_states = workshop.encoded(encoder, "dev", workshop.used("dev")) if team.leads else None
        encode_seconds = time.perf_counter() - started

        decoded: list[SplitResult] = []
        decode_seconds = 0.0

        def decode_dev() -> SplitResult | None:
            """The leader's; the others wait where they next agree on something."""
            nonlocal decode_seconds
            if dev_states is None:
                return None
            started = time.perf_counter()
            results = transcribe(slam, dev_states, dev, workshop.used("dev"), config, team.device, dtype, workshop.progress)
            if team.size == 1:
                make_sure()
            write_utterances(records, candidate, "dev", results)
            decoded.append(SplitResult.of(results))
            decode_seconds += time.perf_counter() - started
            return decoded[-1]

        def at_rung(progressed: Progressed) -> None:
            dev_result, stop, lost = decode_dev(), False, False
            if dev_result is not None:
                progressed.rungs.append((progressed.step, dev_result.errors.model_dump()))
                try:
                    stop = on_rung(progressed.step, dev_result.errors)
                except LeaseLost:
                    lost = True
            stop, lost = team.agree((stop, lost))
            if lost:
                raise LeaseLost
            if stop:
                raise Pruned(progressed)

        def on_step(point: CurvePoint) -> None:
            curve.add(point)
            pace = f"{point.tokens_per_second:,.0f} tokens/s"
            workshop.progress(f"{name or candidate.key}, loss {point.loss:.2f}, {pace}", point.step, budget.steps)

        rung_steps = {round(fraction * budget.steps) or 1 for fraction in config.training.rungs}
        progressed = Progressed(config.training.batch_size)
        state: Literal["complete", "pruned", "failed"] = "complete"
        reason = None
        with LearningCurve(folder, config, team.leads) as curve:
            try:
                progressed = finetune(
                    slam, train_states, workshop.targets, budget, config.training, team, dtype, folder / "checkpoint.pt",
                    rungs=dict.fromkeys(rung_steps, at_rung), on_step=on_step, check=workshop.check,
                )  # fmt: skip
                decode_dev()
            except Pruned as stop:
                progressed, state, reason = stop.args[0], "pruned", f"dominated at step {stop.args[0].step}"
            except Diverged as stop:
                (reason, progressed), state = stop.args, "failed"
            except torch.OutOfMemoryError as stop:
                state, reason = "failed", f"out of memory, with one utterance at a time too ({str(stop).splitlines()[0]})"
        still_ours()
        if first := team.agree(read_record(records, candidate)):  # another worker's, who had the candidate in the meantime
            return first
        if state != "failed" and team.leads:
            save_weights(folder / "weights.safetensors", slam)

    record = RunRecord(
        study=config.name,
        name=name,
        encoder_layers=workshop.depth,
        removed_layers=candidate.removed_layers,
        lora_rank=candidate.lora_rank,
        repeat=candidate.repeat,
        seed=seed,
        state=state,
        reason=reason,
        steps=progressed.step,
        dev=decoded[-1] if decoded and state != "failed" else None,
        rungs=tuple(Rung(step=step, errors=WordErrors(**errors)) for step, errors in progressed.rungs),
        losses=tuple(progressed.losses),
        parameters=parameters,
        cost=RunCost(
            train_seconds=round(progressed.seconds, 2),
            encode_seconds=round(encode_seconds, 2),
            decode_seconds=round(decode_seconds, 2),
            trial_seconds=round(time.perf_counter() - begin, 2),
            peak_memory_bytes=peak_memory_bytes(team.device),
            micro_batch=progressed.micro_batch,
        ),
        provenance=provenance(workshop),
    )
    record = team.agree(record)
    if team.leads:
        write_record(records, record)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def decode_test(workshop: TrainingContext, record: RunRecord) -> RunRecord:
    """The record with its test errors, from the weights that it was trained to. A test split is decoded once, ever."""
    if record.test is not None:
        return record
    config, records = workshop.config, workshop.config.run_folder / "records"
    encoder = workshop.pruned_encoder(record.candidate)
    with lora(workshop.llm, record.lora_rank, config.llm, config.seed) as model:
        slam = SpeechLlm(workshop.fresh_projector(), workshop.llm, model)
        restore(trainable(slam), load_file(record_folder(records, record.candidate) / "weights.safetensors"))
        slam.projector.eval()
        model.eval()
        indices = workshop.used("test")
        states = workshop.encoded(encoder, "test", indices)
        results = transcribe(
            slam, states, workshop.corpora["test"], indices, config, workshop.device, workshop.dtype, workshop.progress,
            beams=config.decoding.test_beams or config.decoding.beams,
        )  # fmt: skip
    write_utterances(records, record.candidate, "test", results)
    tested = record.model_copy(update={"test": SplitResult.of(results)})
    write_record(records, tested)
    return tested


@cache
def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except FileNotFoundError:  # no git on this machine
        return {"commit": None, "dirty": None}


def provenance(workshop: TrainingContext) -> dict[str, Any]:
    """By what, on what and from what a record was made."""
    return {
        "prunesearch": __version__,
        **_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optuna", "jiwer")},
        "device": device_name(workshop.device),
        "threads": torch.get_num_threads(),
        "processes": workshop.team.size,
        "dtype": str(workshop.dtype).removeprefix("torch."),
        "fingerprint": workshop.config.fingerprint(),
        "config": workshop.config.model_dump(mode="json", exclude={"storage"}),
    }
