"""The short fine-tune: projector and LoRA on cached encoder states, resumable at every step."""

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunesearch.model.llm import lora_parameters, recompute_activations, recomputes_activations
from prunesearch.model.system import Reader, Target
from prunesearch.study.config import TrainingConfig
from prunesearch.study.files import write_atomically
from prunesearch.study.interrupt import Interrupted
from prunesearch.study.progress import print_note
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic, attention_for_training, peak_memory_bytes, seed_everything
from prunesearch.training.process_group import ProcessGroup
from prunesearch.training.states import Fetched, Prefetched, StateStore
from prunesearch.training.tensors import different

LOSS_EVERY = 10  # steps between two points of the recorded loss curve
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from the start to the trained weights, that are tried
EXPLODED = 10.0  # times the loss of a guess among the whole vocabulary


class Diverged(RuntimeError):
    """The loss at `step` is not finite, or more than ten times that of a guess; `value` is the loss at `noticed_at`."""

    def __init__(self, step: int, value: float, noticed_at: int):
        super().__init__(f"training diverged at step {step} (loss is {value:.6g} at step {noticed_at})")
        self.step, self.value, self.noticed_at = step, value, noticed_at


@dataclass
class Budget:
    """The same for every candidate and baseline: batches of utterance indices, peak learning rates, and the seed.

    `held_out`: utterances that no batch contains. How far the training goes is chosen on them; none: all the way.
    """

    batches: Sequence[Sequence[int]]
    learning_rate: float
    lora_learning_rate: float
    seed: int
    held_out: Sequence[int] = ()

    @property
    def steps(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class TrainingSet:
    """Encoder states of utterances and what is to be written for them, by index in the corpus."""

    states: StateStore
    targets: Sequence[Target]


@dataclass
class FineTuneProgress:
    """How far a fine-tune has come; a checkpoint holds it beside weights and optimiser."""

    micro_batch: int
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # audio embeddings and text tokens that this process's LLM has read
    losses: list[float] = field(default_factory=list)
    rungs: list[tuple[int, dict[str, int]]] = field(default_factory=list)  # step, dev errors
    interpolation: dict[float, float] | None = None  # held-out loss by share of the way, once one is chosen


@dataclass(frozen=True)
class CurvePoint:
    """A point of the learning curve: loss in nats per token, the projector's learning rate, tokens per second, bytes."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    memory_bytes: int


def trainable(reader: Reader) -> dict[str, torch.nn.Parameter]:
    """The weights that a fine-tune changes, by name."""
    projector = {f"projector.{name}": p for name, p in reader.projector.named_parameters()}
    return {**projector, **lora_parameters(reader.model)}


@dataclass(frozen=True)
class FineTuneSettings:
    """How a fine-tune computes. `on_point` is called every tenth step. `checkpoint`: a file; None writes none."""

    config: TrainingConfig
    group: ProcessGroup
    dtype: torch.dtype
    checkpoint: Path | None = None
    on_point: Callable[[CurvePoint], None] = lambda point: None


class FineTune:
    """Trains the reader in place, up to the step that `run_to` is given, starting from the checkpoint if there is one.

    Each step draws its random numbers from the seed and its own number only, so that a resumed fine-tune ends in the weights of
    an uninterrupted one. A batch that does not fit in memory is halved into micro-batches, whose gradients add up to the
    batch's.
    """

    def __init__(self, reader: Reader, data: TrainingSet, budget: Budget, settings: FineTuneSettings):
        self.reader, self.data, self.budget, self.settings = reader, data, budget, settings
        self._weights = trainable(reader)
        self._start = {name: p.detach().clone() for name, p in self._weights.items()} if budget.held_out else {}
        lora = [p for name, p in self._weights.items() if not name.startswith("projector.")]
        projector = [p for name, p in self._weights.items() if name.startswith("projector.")]
        self._parameters = [*projector, *lora]
        groups = [{"params": projector, "peak": budget.learning_rate}, {"params": lora, "peak": budget.lora_learning_rate}]
        decay = settings.config.weight_decay
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, weight_decay=decay)
        micro_batch = settings.config.micro_batch or settings.config.batch_size
        self.progress = self._resumed() or FineTuneProgress(micro_batch)
        self._saved = time.perf_counter()
        self._loss_limit = EXPLODED * math.log(reader.vocabulary)
        self._train_mode(False)  # until `run_to`: dropout is off where the start is scored
        self._first_bad_step: Tensor | None = None  # on the device, so that the host need not wait for it at every step

    def run_to(self, last: int) -> None:
        """Train up to step `last`, or not at all if that step was reached before.

        Raises Diverged at the next point of the curve; Interrupted or LeaseLost after a step, in all processes after the same
        one; torch.OutOfMemoryError when one utterance at a time is too much.
        """
        group = self.settings.group
        group.wait_for_all()
        begin = time.perf_counter() - self.progress.seconds
        self._train_mode(True)
        for step, fetched in Prefetched(self.data.states, self.budget.batches[:last], self.progress.step, group):
            self._step(step, fetched, begin)
            group.check_step()  # before anything is written: another worker may have the trial by now
            if time.perf_counter() - self._saved > self.settings.config.checkpoint_seconds:
                self.save_checkpoint()
        self._train_mode(False)

    @torch.no_grad()
    def interpolate(self) -> None:
        """Take the point between the start and the trained weights that has the smallest loss on the held-out utterances.

        Training from a good start first destroys; the start itself is one of the points, so that it never has to end worse.
        Without held-out utterances, and when called again, this does nothing. All processes of a group call it.
        Source: weight-space ensembles of a model before and after its fine-tuning (WiSE-FT, arXiv 2109.01903).
        """
        progress, begin = self.progress, time.perf_counter()
        if not self.budget.held_out or progress.interpolation is not None:
            return
        self._train_mode(False)
        end = {name: p.detach().clone() for name, p in self._weights.items()}
        losses = {}
        for share in SHARES:
            self._go(end, share)
            losses[share] = round(self._held_out_loss(), 6)
        self._go(end, min(losses, key=losses.__getitem__))  # of equals, the one nearest to the start
        progress.interpolation = losses
        progress.seconds += time.perf_counter() - begin

    def _go(self, end: dict[str, Tensor], share: float) -> None:
        """Set the weights to a point between the start and the end."""
        restore(self._weights, {name: torch.lerp(start, end[name], share) for name, start in self._start.items()})

    def _held_out_loss(self) -> float:
        """Cross-entropy on the held-out utterances, in nats per token; the same in all processes."""
        group, targets, states = self.settings.group, self.data.targets, self.data.states
        shard, total = group.shard(self.budget.held_out), 0.0
        for rows in by_length([states.length(i) for i in shard], self.progress.micro_batch):
            indices = [shard[row] for row in rows]
            hidden, lengths = states.batch(indices, group.device)
            with arithmetic(group.device, self.settings.dtype):
                total += float(self.reader.loss_sum(hidden, lengths, [targets[i] for i in indices]))
        return group.total(total) / self._tokens(self.budget.held_out)

    @contextmanager
    def checkpoint_when_interrupted(self) -> Iterator[None]:
        """Write a checkpoint if the block raises Interrupted."""
        try:
            yield
        except Interrupted:
            self.save_checkpoint()
            raise

    def _train_mode(self, on: bool) -> None:
        self.reader.projector.train(on)
        self.reader.model.train(on)

    def _tokens(self, indices: Sequence[int]) -> int:
        """The number of tokens that are to be written for these utterances."""
        return sum(len(self.data.targets[i].tokens) for i in indices)

    def _step(self, step: int, fetched: Fetched, begin: float) -> None:
        config, budget, progress = self.settings.config, self.budget, self.progress
        loss = self._gradients(fetched, seed=budget.seed * 1_000_003 + step)
        torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        rate = schedule(step, budget.steps, config.warmup, config.final_learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        progress.step = step + 1
        progress.seconds = time.perf_counter() - begin
        progress.tokens += self.reader.projector.embeddings_of(sum(fetched.positions)) + self._tokens(fetched.shard)
        here = torch.where(loss < self._loss_limit, budget.steps, step)  # NaN compares false
        self._first_bad_step = here if self._first_bad_step is None else torch.minimum(self._first_bad_step, here)
        if step % LOSS_EVERY == 0 or step + 1 == budget.steps:
            self._add_point(step, loss, rate)

    def _add_point(self, step: int, loss: Tensor, rate: float) -> None:
        group, progress = self.settings.group, self.progress
        assert self._first_bad_step is not None
        value, first_bad = group.total(loss.item()), group.least(int(self._first_bad_step))
        if first_bad < self.budget.steps or not math.isfinite(value):
            raise Diverged(first_bad + 1, value, step + 1)
        progress.losses.append(round(value, 6))
        pace = progress.tokens / max(progress.seconds, 1e-9)
        memory = peak_memory_bytes(group.device)
        self.settings.on_point(CurvePoint(step + 1, value, rate * self.budget.learning_rate, pace, memory))

    def _gradients(self, fetched: Fetched, seed: int) -> Tensor:
        """Leave the whole batch's gradients in the parameters; returns this process's part of the mean loss per token.

        When one process runs out of memory, all of them halve their micro-batch. When one utterance at a time is still too
        much, activations are recomputed from then on.
        """
        group, progress = self.settings.group, self.progress
        while True:
            problem = None
            loss = torch.zeros((), device=group.device)
            seed_everything(seed + (group.rank << 40))
            try:
                for first in range(0, len(fetched.shard), progress.micro_batch):
                    loss = loss + self._backward(fetched, slice(first, first + progress.micro_batch))
            except torch.OutOfMemoryError as error:
                problem = error.with_traceback(None)  # the traceback's frames hold tensors
            if not group.any(problem is not None):
                group.sum_gradients(self._parameters)
                return loss
            self._save_memory(problem, len(fetched.shard))

    def _backward(self, fetched: Fetched, rows: slice) -> Tensor:
        group, targets = self.settings.group, self.data.targets
        hidden, lengths = fetched.rows(rows)
        texts = [targets[i] for i in fetched.shard[rows]]
        with attention_for_training(group.device):  # backwards too: recomputed activations must be computed alike
            with arithmetic(group.device, self.settings.dtype):
                part = self.reader.loss_sum(hidden, lengths, texts) / self._tokens(fetched.batch)
            part.backward()
        return part.detach()

    def _save_memory(self, problem: torch.OutOfMemoryError | None, shard: int) -> None:
        """Make the next attempt at a step smaller. Raises torch.OutOfMemoryError when nothing is left to try."""
        progress, model = self.progress, self.reader.base
        if progress.micro_batch > 1:
            progress.micro_batch = (min(progress.micro_batch, shard) + 1) // 2
        elif not recomputes_activations(model):
            recompute_activations(model)  # slower, with the same gradients
        else:
            raise problem or torch.OutOfMemoryError("another process of the group ran out of memory")
        for p in self._parameters:
            p.grad = None
        if self.settings.group.device.type == "cuda":
            torch.cuda.empty_cache()

    def save_checkpoint(self) -> None:
        """The main process writes weights, optimiser and progress, whole or not at all."""
        self._saved = time.perf_counter()
        path = self.settings.checkpoint
        if path is None or not self.settings.group.is_main_process:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "of": self._identity(path),
            "weights": {name: p.detach() for name, p in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
            "progressed": vars(self.progress),
        }
        buffer = io.BytesIO()  # torch would turn a full disk into a RuntimeError
        torch.save(content, buffer)
        write_atomically(path, buffer.getbuffer())

    def _resumed(self) -> FineTuneProgress | None:
        path = self.settings.checkpoint
        if path is None or not path.exists():
            return None
        if problem := self._problem(path, content := _read_checkpoint(path)):
            print_note(f"{path}: {problem}: training starts again from its first step")
            return None
        restore(self._weights, content["weights"])
        self._optimizer.load_state_dict(content["optimizer"])
        return FineTuneProgress(**content["progressed"])

    def _identity(self, path: Path) -> str:
        """What a checkpoint belongs to: the folder that it lies in, which is named after its candidate, and the budget."""
        return hashlib.sha256(json.dumps([path.parent.name, asdict(self.budget)]).encode()).hexdigest()[:16]

    def _problem(self, path: Path, content: dict[str, Any]) -> str | None:
        """Why this fine-tune cannot continue from a checkpoint; None if it can."""
        parts = [content.get(name) for name in ("weights", "optimizer", "progressed")]
        if (
            not all(isinstance(part, dict) for part in parts)
            or not content["progressed"].keys() <= vars(FineTuneProgress(1)).keys()
        ):
            return "the checkpoint is damaged"
        if content.get("of") not in (None, self._identity(path)):  # None: an earlier version wrote it
            return "the checkpoint belongs to another candidate or study"
        moments = content["optimizer"]["state"].values()
        shapes = [tuple(moment["exp_avg"].shape) for moment in moments]
        if different(content["weights"], self._weights) or shapes not in ([], [tuple(p.shape) for p in self._parameters]):
            return "the checkpoint belongs to another candidate or study"
        return None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content; empty if it is damaged, by a loss of power for example."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # torch raises whatever its parts meet in a damaged file: RuntimeError, EOFError, KeyError and others
        return {}
    return content if isinstance(content, dict) else {}


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Fraction of the peak learning rate: linear warm-up, then a cosine down to `final`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def restore(weights: dict[str, torch.nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy saved values into the weights. Raises KeyError when the names differ."""
    if different := weights.keys() ^ saved.keys():
        raise KeyError(f"these weights belong to another candidate: {sorted(different)[:3]}")
    for name, parameter in weights.items():
        parameter.copy_(saved[name])
