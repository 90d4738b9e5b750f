"""What a candidate costs, and what our training step saves against a plain loop.

    python benchmarks/step.py studies/quickstart [--steps 40] [--rank 8]

The plain loop does what SLAM-ASR training scripts do: features of each utterance in each step, padded to Whisper's full
window, the encoder run in every step, logits at every position. Both sides have the same weights at the start, the same
utterances in the same steps, the same precision and optimiser, and take turns in one process. Ours pays for its encoder
states once; that time is counted in full, so the ratio is of whole fine-tunes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prunesearch.candidate import Candidate
from prunesearch.config import load_study
from prunesearch.model.llm import lora, pad_tokens
from prunesearch.model.slam import SlamAsr
from prunesearch.speech.audio import read_audio
from prunesearch.training.device import attention_for_training, autocast, seed_everything
from prunesearch.training.finetune import trainable
from prunesearch.training.workshop import Workshop


def plain_loss(workshop: Workshop, slam: SlamAsr, batch: list[int]) -> torch.Tensor:
    """Cross-entropy the plain way: everything from the audio file on, at full length."""
    recordings = [read_audio(workshop.corpora["train"][i].audio) for i in batch]
    with torch.autocast(workshop.device.type, enabled=False):  # the extractor computes in torch, and hands out NumPy
        extracted = workshop.extractor(recordings, sampling_rate=16_000, return_tensors="pt")
    features = extracted["input_features"]  # (B, M, full window)
    with torch.no_grad():
        states = workshop.encoder(features.to(workshop.dtype)).last_hidden_state
    lengths = torch.full((len(batch),), states.shape[1])
    texts = [workshop.targets[i] for i in batch]
    tokens = pad_tokens(texts, 0, workshop.device)
    prefix, mask = slam.prefix(states, lengths)
    embedded = slam.llm.model.get_input_embeddings()(tokens).to(prefix.dtype)
    mask = torch.cat([mask, torch.tensor([[1] * len(t) + [0] * (tokens.shape[1] - len(t)) for t in texts])], 1)
    logits = slam.model(inputs_embeds=torch.cat([prefix, embedded], 1), attention_mask=mask, use_cache=False).logits
    labels = torch.cat([torch.full(prefix.shape[:2], -100), pad_tokens(texts, -100, workshop.device)], 1)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def run_steps(
    slam: SlamAsr, optimizer: torch.optim.Optimizer, steps: range, loss_of: Callable[[int], torch.Tensor], workshop: Workshop
) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    seconds, losses = [], []
    slam.projector.train()
    slam.model.train()
    for step in steps:
        seed_everything(step)
        begin = time.perf_counter()
        with autocast(workshop.device, workshop.dtype):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(slam).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def main(study: Path, steps: int, rank: int, turns: int) -> None:
    config = load_study(study)
    workshop = Workshop.open(config)
    batches = workshop.budget.batches[:steps]
    steps = len(batches)
    rate = config.training.learning_rate
    drawn = [i for batch in batches for i in batch]
    begin = time.perf_counter()
    _ = workshop.corpora, workshop.targets
    workshop.prefix("train")
    once_per_study = time.perf_counter() - begin
    begin = time.perf_counter()
    states = workshop.encoded(workshop.pruned_encoder(Candidate()), "train", drawn)
    encode_seconds = time.perf_counter() - begin

    sides: dict[str, tuple[list[float], list[float]]] = {"plain": ([], []), "ours": ([], [])}
    # each side trains weights of its own; LoRA sits on one LLM, so the sides swap it in and out by turns
    saved: dict[str, tuple[dict[str, torch.Tensor], dict]] = {}
    for turn in range(turns):
        span = range(turn * steps // turns, (turn + 1) * steps // turns)
        for side in sides:
            with lora(workshop.llm, rank, config.llm, config.seed) as model:
                slam = SlamAsr(workshop.fresh_projector(), workshop.llm, model)
                optimizer = torch.optim.AdamW(trainable(slam).values(), lr=rate, weight_decay=config.training.weight_decay)
                if side in saved:
                    weights, state = saved[side]
                    with torch.no_grad():
                        for name, p in trainable(slam).items():
                            p.copy_(weights[name])
                    optimizer.load_state_dict(state)

                def ours(step: int, slam: SlamAsr = slam) -> torch.Tensor:
                    hidden, lengths = states.batch(batches[step], workshop.device)
                    with attention_for_training(workshop.device):
                        return slam.loss(hidden, lengths, [workshop.targets[i] for i in batches[step]])

                def plain(step: int, slam: SlamAsr = slam) -> torch.Tensor:
                    return plain_loss(workshop, slam, batches[step])

                seconds, losses = run_steps(slam, optimizer, span, ours if side == "ours" else plain, workshop)
                sides[side][0].extend(seconds)
                sides[side][1].extend(losses)
                saved[side] = {n: p.detach().clone() for n, p in trainable(slam).items()}, optimizer.state_dict()

    budget = workshop.budget.steps
    plain_step, our_step = (statistics.median(sides[side][0]) for side in ("plain", "ours"))
    whole_plain, whole_ours = budget * plain_step, budget * our_step + encode_seconds * budget / steps
    table = Table(
        title=f"{config.name}: {steps} steps of each, in {turns} turns; {torch.get_num_threads()} threads, {workshop.dtype}"
    )
    for column in ("", "plain loop", "ours", "ratio"):
        table.add_column(column, justify="right")
    table.add_row("median step, s", f"{plain_step:.3f}", f"{our_step:.3f}", f"{plain_step / our_step:.1f}")
    table.add_row("encoder states, s a candidate", "0", f"{encode_seconds * budget / steps:.1f}", "")
    table.add_row(
        f"fine-tune of {budget} steps, s", f"{whole_plain:.1f}", f"{whole_ours:.1f}", f"{whole_plain / whole_ours:.1f}"
    )
    thirds = [(0, steps // 3), (steps // 3, 2 * steps // 3), (2 * steps // 3, steps)]
    for first, last in thirds:
        means = [statistics.mean(sides[side][1][first:last]) for side in ("plain", "ours")]
        table.add_row(f"loss, steps {first + 1} to {last}", *(f"{m:.3f}" for m in means), f"{means[0] / means[1]:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"log-mels and shared layers, once per study: {once_per_study:.1f} s (0 when the study has run before)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    main(**vars(parser.parse_args()))
