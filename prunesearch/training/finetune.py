"""The short fine-tune: projector and LoRA on cached encoder states."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunesearch.config import TrainingConfig
from prunesearch.model.llm import lora_parameters
from prunesearch.model.slam import SlamAsr
from prunesearch.training.device import autocast, seed_everything
from prunesearch.training.features import StateStore

LOSS_EVERY = 10  # steps between two points of the recorded loss curve


class Diverged(RuntimeError):
    """The loss is no longer a finite number; the second argument says how far the fine-tune had come."""


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

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    rungs: list[tuple[int, dict[str, int]]] = field(default_factory=list)


def trainable(slam: SlamAsr) -> dict[str, torch.nn.Parameter]:
    """The weights that a fine-tune changes, by name."""
    projector = {f"projector.{name}": p for name, p in slam.projector.named_parameters()}
    return {**projector, **lora_parameters(slam.model)}


def finetune(
    slam: SlamAsr,
    states: StateStore,
    targets: Sequence[list[int]],
    budget: Budget,
    config: TrainingConfig,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Path | None = None,
    rungs: dict[int, Callable[[Progressed], None]] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Progressed:
    """Train `slam` in place for the budget's steps, going on from `checkpoint` where there is one.

    `rungs` maps a step to what is done after it; it may raise Pruned. Every step draws its randomness from the seed
    and its own number alone, so that a resumed fine-tune ends in the weights of an uninterrupted one.
    Raises Diverged when the loss is not finite.
    """
    weights = trainable(slam)
    lora = [p for name, p in weights.items() if not name.startswith("projector.")]
    projector = [p for name, p in weights.items() if name.startswith("projector.")]
    groups = [{"params": projector, "peak": budget.learning_rate}, {"params": lora, "peak": budget.lora_learning_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, weight_decay=config.weight_decay)
    progressed = _resume(checkpoint, weights, optimizer) or Progressed()
    begin, saved = time.perf_counter() - progressed.seconds, time.perf_counter()
    parameters = [*projector, *lora]

    slam.projector.train()
    slam.model.train()
    for step in range(progressed.step, budget.steps):
        seed_everything(budget.seed * 1_000_003 + step)
        batch = budget.batches[step]
        hidden, lengths = states.batch(batch, device)
        with autocast(device, dtype):
            loss = slam.loss(hidden, lengths, [targets[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, budget.steps, config.warmup, config.final_learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        progressed.step = step + 1
        progressed.seconds = time.perf_counter() - begin
        if step % LOSS_EVERY == 0 or step + 1 == budget.steps:
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value} at step {step + 1}", progressed)
            progressed.losses.append(round(value, 6))
            if on_step:
                on_step(step + 1, value)
        if rungs and step + 1 in rungs:
            slam.projector.eval()
            slam.model.eval()
            rungs[step + 1](progressed)
            slam.projector.train()
            slam.model.train()
        now = time.perf_counter()
        if checkpoint and now - saved > config.checkpoint_seconds and step + 1 < budget.steps:
            _save(checkpoint, weights, optimizer, progressed)
            saved = now
    slam.projector.eval()
    slam.model.eval()
    return progressed


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
    torch.save(whole, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def _resume(path: Path | None, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Progressed | None:
    if path is None or not path.exists():
        return None
    whole = torch.load(path, map_location="cpu", weights_only=True)
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
