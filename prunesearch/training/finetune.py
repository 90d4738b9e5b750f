"""The short fine-tune: projector and LoRA on cached encoder states."""

import io
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunesearch.model.llm import lora_parameters, recompute_activations, recomputes_activations
from prunesearch.model.slam import SpeechLlm
from prunesearch.study.config import TrainingConfig
from prunesearch.study.interrupt import Interrupted
from prunesearch.study.record import write_atomically
from prunesearch.training.device import arithmetic, attention_for_training, peak_memory_bytes, seed_everything
from prunesearch.training.process_group import ProcessGroup
from prunesearch.training.states import Fetched, Prefetched, StateStore

LOSS_EVERY = 10  # steps between two points of the recorded loss curve
EXPLODED = 10.0  # times the loss of guessing among the whole vocabulary


class Diverged(RuntimeError):
    """The loss is no longer a finite number, or beyond reason; the second argument says how far the fine-tune had come."""


class Pruned(Exception):
    """A rung ended this fine-tune; the first argument says how far it had come."""


@dataclass
class Budget:
    """What every competitor gets alike: batches of utterance indices, peak learning rates, and the seed."""

    batches: Sequence[Sequence[int]]
    learning_rate: float
    lora_learning_rate: float
    seed: int

    @property
    def steps(self) -> int:
        return len(self.batches)


@dataclass
class Progressed:
    """How far a fine-tune has come; what a checkpoint holds beside weights and optimiser."""

    micro_batch: int
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # audio embeddings and text tokens that this process' LLM has read
    losses: list[float] = field(default_factory=list)
    rungs: list[tuple[int, dict[str, int]]] = field(default_factory=list)


@dataclass(frozen=True)
class CurvePoint:
    """A point of the learning curve: loss in nats per token, the projector's learning rate, tokens a second, bytes."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    memory_bytes: int


def trainable(slam: SpeechLlm) -> dict[str, torch.nn.Parameter]:
    """The weights that a fine-tune changes, by name."""
    projector = {f"projector.{name}": p for name, p in slam.projector.named_parameters()}
    return {**projector, **lora_parameters(slam.model)}


def finetune(
    slam: SpeechLlm,
    states: StateStore,
    targets: Sequence[list[int]],
    budget: Budget,
    config: TrainingConfig,
    team: ProcessGroup,
    dtype: torch.dtype,
    checkpoint: Path | None = None,
    rungs: dict[int, Callable[[Progressed], None]] | None = None,
    on_step: Callable[[CurvePoint], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Progressed:
    """Train `slam` in place for the budget's steps, going on from `checkpoint` where there is one.

    `rungs` maps a step to what is done after it; it may raise Pruned. Every step draws its randomness from the seed
    and its own number alone, so that a resumed fine-tune ends in the weights of an uninterrupted one. A batch that does
    not fit in memory is halved into micro-batches, whose gradients add up to the batch's; the steps stay the same. `check` is
    called after every step; when it, or a rung, raises Interrupted, a checkpoint is left.
    Raises Diverged when the loss is not finite, or ten times that of a guess: at the next point of the curve, naming the step.
    """
    weights = trainable(slam)
    lora = [p for name, p in weights.items() if not name.startswith("projector.")]
    projector = [p for name, p in weights.items() if name.startswith("projector.")]
    groups = [{"params": projector, "peak": budget.learning_rate}, {"params": lora, "peak": budget.lora_learning_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, weight_decay=config.weight_decay)
    progressed = _resume(checkpoint, weights, optimizer) or Progressed(micro_batch=config.micro_batch or config.batch_size)
    begin, saved = time.perf_counter() - progressed.seconds, time.perf_counter()
    parameters = [*projector, *lora]

    def train(on: bool) -> None:
        slam.projector.train(on)
        slam.model.train(on)

    beyond = EXPLODED * math.log(slam.llm.model.get_input_embeddings().num_embeddings)
    wrong: Tensor | None = None  # on the device: nobody waits for it at every step
    try:
        if rungs and (step := progressed.step) in rungs and step not in (passed for passed, _ in progressed.rungs):
            rungs[step](progressed)  # it was stopped in this one
        train(True)
        for step, fetched in Prefetched(states, budget.batches, progressed.step, team):
            loss = _gradients(slam, fetched, targets, budget.seed * 1_000_003 + step, progressed, team, dtype, parameters)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            rate = schedule(step, budget.steps, config.warmup, config.final_learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
            progressed.step = step + 1
            progressed.seconds = time.perf_counter() - begin
            progressed.tokens += sum(fetched.positions) // slam.projector.stack + sum(len(targets[i]) for i in fetched.share)
            here = torch.where(loss < beyond, budget.steps, step)  # no comparison with NaN holds
            wrong = here if wrong is None else torch.minimum(wrong, here)
            if step % LOSS_EVERY == 0 or step + 1 == budget.steps:
                value, first = team.total(loss.item()), team.least(int(wrong))
                if first < budget.steps or not math.isfinite(value):
                    raise Diverged(f"the loss left all reason at step {first + 1} ({value:.6g} at step {step + 1})", progressed)
                progressed.losses.append(round(value, 6))
                if on_step:
                    pace = progressed.tokens / max(progressed.seconds, 1e-9)
                    on_step(CurvePoint(step + 1, value, rate * budget.learning_rate, pace, peak_memory_bytes(team.device)))
            if rungs and step + 1 in rungs:
                train(False)
                rungs[step + 1](progressed)
                train(True)
            check()  # before anything is written: another worker may have the trial by now
            now = time.perf_counter()
            if checkpoint and now - saved > config.checkpoint_seconds:
                if team.leads:
                    _save(checkpoint, weights, optimizer, progressed)
                saved = now
    except Interrupted:
        if checkpoint and team.leads:
            _save(checkpoint, weights, optimizer, progressed)
        raise
    train(False)
    return progressed


def _gradients(
    slam: SpeechLlm,
    fetched: Fetched,
    targets: Sequence[list[int]],
    seed: int,
    progressed: Progressed,
    team: ProcessGroup,
    dtype: torch.dtype,
    parameters: Sequence[torch.nn.Parameter],
) -> Tensor:
    """Leave the whole batch's gradients in the parameters; returns this member's part of its mean loss per token.

    Every member halves its micro-batch when one of them runs out of memory. When one utterance at a time is still too much,
    activations are recomputed from then on.
    """
    tokens = sum(len(targets[i]) for i in fetched.batch)
    while True:
        seed_everything(seed + (team.rank << 40))
        loss = torch.zeros((), device=team.device)
        problem = None
        try:
            for first in range(0, len(fetched.share), progressed.micro_batch):
                rows = slice(first, first + progressed.micro_batch)
                hidden, lengths = fetched.rows(rows)
                with attention_for_training(team.device):  # backwards too: what is recomputed must be computed alike
                    with arithmetic(team.device, dtype):
                        part = slam.loss_sum(hidden, lengths, [targets[i] for i in fetched.share[rows]]) / tokens
                    part.backward()
                loss = loss + part.detach()
        except torch.OutOfMemoryError as error:
            problem = error.with_traceback(None)  # the traceback's frames hold tensors
        if not (team.total(problem is not None) if team.size > 1 else problem):
            team.sum_gradients(parameters)
            return loss
        if progressed.micro_batch > 1:
            progressed.micro_batch = (min(progressed.micro_batch, len(fetched.share)) + 1) // 2
        elif not recomputes_activations(slam.llm.model):
            recompute_activations(slam.llm.model)  # slower, with the same gradients
        else:
            raise problem or torch.OutOfMemoryError("another process of the team ran out of memory")
        for p in parameters:
            p.grad = None
        if team.device.type == "cuda":
            torch.cuda.empty_cache()


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `final`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _save(path: Path, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, progressed: Progressed) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {
        "weights": {name: p.detach() for name, p in weights.items()},
        "optimizer": optimizer.state_dict(),
        "progressed": vars(progressed),
    }
    buffer = io.BytesIO()  # torch would call a full disk a RuntimeError
    torch.save(whole, buffer)
    write_atomically(path, buffer.getbuffer())


def _resume(path: Path | None, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Progressed | None:
    if path is None or not path.exists():
        return None
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # spoilt, by a loss of power perhaps: begin anew
        return None
    restore(weights, whole["weights"])
    optimizer.load_state_dict(whole["optimizer"])
    return Progressed(**whole["progressed"])


@torch.no_grad()
def restore(weights: dict[str, torch.nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy saved values into the weights. Raises KeyError when the names are not the same."""
    if missing := weights.keys() ^ saved.keys():
        raise KeyError(f"these weights are not of this candidate: {sorted(missing)[:3]}")
    for name, parameter in weights.items():
        parameter.copy_(saved[name])
