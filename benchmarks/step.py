"""What a candidate costs, and what our training step saves against a plain loop.

    python benchmarks/step.py studies/quickstart [--steps 12] [--rank 8] [--turns 3]

The plain loop does what SLAM-ASR training scripts do: features of each utterance in each step, padded to Whisper's full
window, the encoder run over all of it in every step, an LLM as long as the window (what lies beyond an utterance is
masked, so that both sides train the same system), logits at every position. Both sides start from the same weights (a
fresh projector; `--warm`: the study's anchor, which ours has trained) and see the same utterances in the same steps, with
the same precision and optimiser, taking turns in one process. Ours pays for its encoder states once; that time is counted
in full, so the ratio is of whole fine-tunes.

How much two loss curves may differ by chance is shown by a third run: ours again, with other dropout.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from prunesearch.model.llm import lora, pad_tokens
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import read_audio
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic, attention_for_training, seed_everything
from prunesearch.training.finetune import restore, trainable


@dataclass
class Side:
    """One of the competitors: what its steps took and lost, and where it stands between two turns."""

    seconds: list[float]
    losses: list[float]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def plain_loss(context: TrainingContext, slam: SpeechLlm, batch: list[int]) -> torch.Tensor:
    """Cross-entropy the plain way: everything from the audio file on, at full length."""
    recordings = [read_audio(context.corpora["train"][i].audio) for i in batch]
    with torch.autocast(context.device.type, enabled=False):  # the extractor computes in torch, and hands out NumPy
        extracted = context.extractor(recordings, sampling_rate=16_000, return_tensors="pt")
    features = extracted["input_features"]  # (B, M, full window)
    with torch.no_grad():
        states = context.encoder(features.to(context.device, context.dtype)).last_hidden_state
    hop = 2 * context.extractor.hop_length  # samples per encoder position
    lengths = torch.tensor([-(-len(recording) // hop) for recording in recordings], device=context.device)
    texts = [context.targets[i] for i in batch]
    tokens = pad_tokens(texts, 0, context.device)
    prefix, mask = slam.prefix(states, lengths)
    embedded = slam.llm.model.get_input_embeddings()(tokens).to(prefix.dtype)
    written = [[1] * len(text) + [0] * (tokens.shape[1] - len(text)) for text in texts]
    mask = torch.cat([mask, torch.tensor(written, device=context.device)], 1)
    logits = slam.model(inputs_embeds=torch.cat([prefix, embedded], 1), attention_mask=mask, use_cache=False).logits
    labels = torch.cat([torch.full(prefix.shape[:2], -100), pad_tokens(texts, -100, context.device)], 1)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def run_steps(
    slam: SpeechLlm,
    optimizer: torch.optim.Optimizer,
    steps: range,
    loss_of: Callable[[int], torch.Tensor],
    context: TrainingContext,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step; dropout is drawn from the seed and the step."""
    seconds, losses = [], []
    slam.projector.train()
    slam.model.train()
    for step in steps:
        seed_everything(seed + step)
        begin = time.perf_counter()
        with arithmetic(context.device, context.dtype):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(slam).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def main(study: Path, steps: int, rank: int, turns: int, warm: bool) -> None:
    logging.set_verbosity_error()
    config = load_study(study)
    context = TrainingContext.open(config)
    batches = context.budget().batches[:steps]
    steps = len(batches)
    training = config.training
    drawn = sorted({i for batch in batches for i in batch})
    begin = time.perf_counter()
    _ = context.corpora, context.targets
    context.prefix("train")
    once_per_study = time.perf_counter() - begin
    begin = time.perf_counter()
    states = context.encoded(context.pruned_encoder(Candidate()), "train", drawn)
    encode_seconds = (time.perf_counter() - begin) / len(drawn) * len(context.drawn(context.budget()))

    sides = {side: Side([], []) for side in ("plain", "ours", "again")}
    # each side trains weights of its own; LoRA sits on one LLM, so the sides swap it in and out by turns
    for turn in range(turns):
        span = range(turn * steps // turns, (turn + 1) * steps // turns)
        for name, side in sides.items():
            with lora(context.llm, rank, config.llm, config.seed) as model:
                projector = starting_projector(context) if warm else context.fresh_projector()
                slam = SpeechLlm(projector, context.llm, model)
                optimizer = torch.optim.AdamW(
                    trainable(slam).values(), lr=training.learning_rate, weight_decay=training.weight_decay
                )
                if side.weights:
                    restore(trainable(slam), side.weights)
                    optimizer.load_state_dict(side.optimizer)

                def ours(step: int, slam: SpeechLlm = slam) -> torch.Tensor:
                    hidden, lengths = states.batch(batches[step], context.device)
                    with attention_for_training(context.device):
                        return slam.loss(hidden, lengths, [context.targets[i] for i in batches[step]])

                def plain(step: int, slam: SpeechLlm = slam) -> torch.Tensor:
                    return plain_loss(context, slam, batches[step])

                loss_of, seed = plain if name == "plain" else ours, 1_000_000 if name == "again" else 0
                seconds, losses = run_steps(slam, optimizer, span, loss_of, context, seed)
                side.seconds += seconds
                side.losses += losses
                side.weights = {n: p.detach().clone() for n, p in trainable(slam).items()}
                side.optimizer = optimizer.state_dict()

    budget = context.budget().steps
    plain_step, our_step = (statistics.median(sides[side].seconds) for side in ("plain", "ours"))
    whole_plain, whole_ours = budget * plain_step, budget * our_step + encode_seconds
    table = Table(
        title=f"{config.name}: {steps} steps of each, in {turns} turns; {torch.get_num_threads()} threads, {context.dtype}"
    )
    for column in ("", "plain loop", "ours", "ratio", "ours, other dropout"):
        table.add_column(column, justify="right")
    table.add_row("median step, s", f"{plain_step:.3f}", f"{our_step:.3f}", f"{plain_step / our_step:.1f}")
    table.add_row("encoder states, s a candidate", "0", f"{encode_seconds:.1f}")
    table.add_row(
        f"fine-tune of {budget} steps, s", f"{whole_plain:.1f}", f"{whole_ours:.1f}", f"{whole_plain / whole_ours:.1f}"
    )
    thirds = [(0, steps // 3), (steps // 3, 2 * steps // 3), (2 * steps // 3, steps)]
    for first, last in thirds:
        theirs, our_loss, again = (statistics.mean(side.losses[first:last]) for side in sides.values())
        row = f"{theirs:.3f}", f"{our_loss:.3f}", f"{theirs / our_loss:.2f}", f"{again:.3f}"
        table.add_row(f"loss, steps {first + 1} to {last}", *row)
    console = Console(width=110)
    console.print(table)
    ours_losses = sides["ours"].losses
    for name, what in (("plain", "plain loop against ours"), ("again", "ours against ours with other dropout")):
        apart = [a - b for a, b in zip(sides[name].losses, ours_losses, strict=True)]
        spread = statistics.mean(map(abs, apart))
        console.print(f"loss, {what}: {statistics.mean(apart):+.3f} on average, {spread:.3f} apart in a step")
    console.print(f"log-mels and shared layers, once per study: {once_per_study:.1f} s (0 when the study has run before)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="start from the anchor")
    main(**vars(parser.parse_args()))
