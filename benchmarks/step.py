"""Time of our fine-tune, compared with a plain training loop, and the two loss curves.

    python benchmarks/step.py studies/quickstart [--steps 12] [--rank 8] [--turns 3] [--window]

The plain loop has the habits of the published SLAM-ASR trainer (arXiv 2603.27981). In each step it computes the features of
each utterance, padded to whole seconds, and runs the encoder. Logits are computed at every position and moved to the host,
where the word errors of the training batch are counted. The LLM recomputes its activations in the backward pass (gradient
checkpointing).

With `--window`, utterances are padded to Whisper's full window of 30 s instead, as many other scripts do. In both cases, what
lies beyond the end of an utterance is masked for the LLM, so that both loops train the same system.

Both loops start from the same weights: a fresh projector or, with `--warm`, the study's anchor. They see the same utterances in
the same steps, with the same precision and optimiser. They run in one process, a few steps in turn. Our loop computes its
encoder states once; the table counts this time in full, so that its ratio compares whole fine-tunes.

A third run is ours again with another seed for dropout. It shows how much two loss curves may differ by chance.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plain_loop import IGNORED, plain_loss_and_logits
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.model.llm import recompute_activations, recomputes_activations
from prunesearch.speech.audio import SAMPLE_RATE, read_audio
from prunesearch.speech.text import paper
from prunesearch.speech.wer import count_errors
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.record import WordErrors
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic, attention_for_training, seed_everything
from prunesearch.training.finetune import restore, trainable
from prunesearch.training.states import StateStore, batch_of, features_of

Batch = Sequence[int]  # indices of utterances in train
WHOLE_SECONDS = 1.0


@dataclass(frozen=True)
class PlainLoop:
    """The plain loop's loss: everything is computed from the audio files. `window`: at full length."""

    context: TrainingContext
    window: bool = False
    recomputes_activations = True

    def __call__(self, slam: SpeechLlm, batch: Batch) -> torch.Tensor:
        context = self.context
        recordings = [read_audio(context.corpora["train"][i].audio) for i in batch]
        with torch.autocast(context.device.type, enabled=False):  # the extractor computes in torch, and returns NumPy arrays
            states = self._states(recordings)
        hop = 2 * context.encoder.extractor.hop_length  # samples per encoder position
        lengths = torch.tensor([-(-len(recording) // hop) for recording in recordings], device=context.device)
        targets = [context.targets[i] for i in batch]
        loss, logits, labels = plain_loss_and_logits(slam, states, lengths, targets)
        self._count_errors(slam, logits.detach().float().cpu(), labels.cpu())
        return loss

    @torch.no_grad()
    def _states(self, recordings: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        context = self.context
        if self.window:
            extracted = context.encoder.extractor(recordings, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            features = extracted["input_features"].to(context.device, context.dtype)  # (B, M, full window)
            states: torch.Tensor = context.encoder.module(features).last_hidden_state
            return states
        cpu = torch.device("cpu")
        features, frames = batch_of([features_of(context.encoder, r, WHOLE_SECONDS, cpu) for r in recordings], context.device)
        return context.encoder.encode(features.to(context.dtype), frames)[0]

    @staticmethod
    def _count_errors(slam: SpeechLlm, logits: torch.Tensor, labels: torch.Tensor) -> WordErrors:
        """Word errors of what the LLM would write, given the text before each token."""
        inside = labels[:, 1:] != IGNORED
        rows = list(zip(logits[:, :-1].argmax(-1), labels[:, 1:], inside, strict=True))
        said, heard = (slam.texts([row[i][row[2]].tolist() for row in rows]) for i in (1, 0))
        return sum((count_errors(paper(a), paper(b)) for a, b in zip(said, heard, strict=True)), WordErrors())


@dataclass(frozen=True)
class OurLoop:
    """Our loss: encoder states come from the cache."""

    context: TrainingContext
    states: StateStore
    recomputes_activations = False

    def __call__(self, slam: SpeechLlm, batch: Batch) -> torch.Tensor:
        hidden, lengths = self.states.batch(batch, self.context.device)
        with attention_for_training(self.context.device):
            return slam.loss(hidden, lengths, [self.context.targets[i] for i in batch])


@dataclass
class Competitor:
    """A training loop: its loss and the seed of its dropout, its results, and its state between two turns."""

    loss_of: "PlainLoop | OurLoop"
    seed: int
    seconds: list[float] = field(default_factory=list)  # of each step
    losses: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def take_turn(self, context: TrainingContext, batches: dict[int, Batch], rank: int, warm: bool) -> None:
        """Train on these batches, by step. LoRA sits on the one LLM that all competitors share, so each turn puts it on."""
        config, training = context.config, context.config.training
        projector = starting_projector(context) if warm else context.fresh_projector()
        with context.system.reader(projector, rank, config.seed) as slam:
            weights = trainable(slam)
            optimizer = torch.optim.AdamW(weights.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
            if self.weights:
                restore(weights, self.weights)
                optimizer.load_state_dict(self.optimizer)
            slam.projector.train()
            slam.model.train()
            recomputes = self.loss_of.recomputes_activations and not recomputes_activations(slam.base)
            if recomputes:
                recompute_activations(slam.base)
            for step, batch in batches.items():
                self._step(context, slam, optimizer, step, batch)
            if recomputes:
                # transformers deprecates the second name, and its older versions lack the first
                (getattr(slam.base, "activation_checkpointing_disable", None) or slam.base.gradient_checkpointing_disable)()
            self.weights = {name: p.detach().clone() for name, p in weights.items()}
            self.optimizer = optimizer.state_dict()

    def _step(
        self, context: TrainingContext, slam: SpeechLlm, optimizer: torch.optim.Optimizer, step: int, batch: Batch
    ) -> None:
        seed_everything(self.seed + step)
        begin = time.perf_counter()
        with arithmetic(context.device, context.dtype):
            loss = self.loss_of(slam, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(slam).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for a GPU
        self.seconds.append(time.perf_counter() - begin)


@dataclass(frozen=True)
class EncodingTimes:
    """Seconds for what all candidates share (features, shared layers), and for one candidate's encoder states."""

    once_per_study: float
    per_candidate: float


def encode(context: TrainingContext, batches: Sequence[Batch]) -> tuple[StateStore, EncodingTimes]:
    """The encoder states of the batches. The time per candidate is scaled up to all utterances of a whole fine-tune."""
    needed = sorted({i for batch in batches for i in batch})
    begin = time.perf_counter()
    _ = context.corpora, context.targets
    context.prefix("train")
    once_per_study = time.perf_counter() - begin
    begin = time.perf_counter()
    states = context.encoded(context.pruned_encoder(Candidate()), "train", needed)
    seconds = time.perf_counter() - begin
    return states, EncodingTimes(once_per_study, seconds / len(needed) * len(context.drawn(context.budget())))


def table_of(competitors: dict[str, Competitor], budget: int, encode_seconds: float, title: str) -> Table:
    """`budget`: the steps of a whole fine-tune."""
    table = Table(title=title)
    for column in ("", "plain loop", "ours", "ratio", "ours, other dropout"):
        table.add_column(column, justify="right")
    plain, ours = (statistics.median(competitors[name].seconds) for name in ("plain", "ours"))
    whole_plain, whole_ours = budget * plain, budget * ours + encode_seconds
    table.add_row("median step, s", f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.1f}")
    table.add_row("encoder states, s per candidate", "0", f"{encode_seconds:.1f}")
    ratio = f"{whole_plain / whole_ours:.1f}"
    table.add_row(f"fine-tune of {budget} steps, s", f"{whole_plain:.1f}", f"{whole_ours:.1f}", ratio)
    steps = len(competitors["ours"].losses)
    for first, last in ((0, steps // 3), (steps // 3, 2 * steps // 3), (2 * steps // 3, steps)):
        theirs, our_loss, again = (statistics.mean(c.losses[first:last]) for c in competitors.values())
        row = f"{theirs:.3f}", f"{our_loss:.3f}", f"{theirs / our_loss:.2f}", f"{again:.3f}"
        table.add_row(f"loss, steps {first + 1} to {last}", *row)
    return table


def main(study: Path, steps: int, rank: int, turns: int, warm: bool, window: bool) -> None:
    logging.set_verbosity_error()
    config = load_study(study)
    context = TrainingContext.open(config)
    budget = context.budget()
    batches = budget.batches[:steps]
    steps = len(batches)
    states, times = encode(context, batches)
    competitors = {
        "plain": Competitor(PlainLoop(context, window), seed=0),
        "ours": Competitor(OurLoop(context, states), seed=0),
        "again": Competitor(OurLoop(context, states), seed=1_000_000),
    }
    for turn in range(turns):
        span = range(turn * steps // turns, (turn + 1) * steps // turns)
        for competitor in competitors.values():
            competitor.take_turn(context, {step: batches[step] for step in span}, rank, warm)

    title = f"{config.name}: {steps} steps of each, in {turns} turns; {torch.get_num_threads()} threads, {context.dtype}"
    console = Console(width=110)
    console.print(table_of(competitors, budget.steps, times.per_candidate, title))
    for name, what in (("plain", "plain loop minus ours"), ("again", "ours with other dropout minus ours")):
        differences = [a - b for a, b in zip(competitors[name].losses, competitors["ours"].losses, strict=True)]
        size = statistics.mean(map(abs, differences))
        console.print(f"loss, {what}: {statistics.mean(differences):+.3f} on average, {size:.3f} in absolute value per step")
    once = f"{times.once_per_study:.1f} s (0 if the study has been run before)"
    console.print(f"features and shared layers, once per study: {once}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="steps of each loop")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--turns", type=int, default=3, help="the loops alternate in so many turns")
    parser.add_argument("--window", action="store_true", help="the plain loop pads utterances to Whisper's full window")
    parser.add_argument("--warm", action="store_true", help="start from the study's anchor")
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error(f"--steps must be at least 3, since losses are shown by thirds, got {arguments.steps}")
    main(**vars(arguments))
