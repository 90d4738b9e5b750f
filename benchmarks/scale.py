"""A training step at full size, with random weights: tokens a second, share of the card's bf16 peak, memory.

    python benchmarks/scale.py studies/paper/large-v2-da.toml [--batch 8] [--seconds 8] [--words 40] [--rank 8]

Architectures come from the study, weights from nowhere: speed does not ask for meaning, and nothing is downloaded. Ours
is the step of a candidate (encoder states from the cache, logits at the text alone). The plain loop pads to Whisper's
window, runs the encoder in every step, and has logits at every position. They take turns; medians are shown.
Operations are counted by torch (matrix products and attention, as they are executed), so the share of the peak is of
useful and useless work alike: compare the steps a second, and read the share as how busy the card was.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import encode
from prunesearch.model.hub import read_architecture
from prunesearch.model.llm import Llm, embedding_scale, lora
from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.study.config import load_study
from prunesearch.training.device import arithmetic, attention_for_training, pick_dtype
from prunesearch.training.finetune import trainable
from prunesearch.training.process_group import ProcessGroup

BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}  # dense, from the data sheets


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second at most, and where the figure comes from: the data sheet, else a large product on this device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if found := next((peak for card, peak in BF16_PEAK.items() if card in name), None):
            return found, f"data sheet of {name}"
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = statistics.median(timed(lambda: a @ a, device) for _ in range(9))
    return 2 * 2048**3 / seconds, "a product of 2,048 x 2,048 matrices"


def timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def main(study: Path, batch: int, seconds: float, words: int, rank: int, steps: int) -> None:
    config = load_study(study, data_must_exist=False)
    device = ProcessGroup.join().device
    dtype = pick_dtype(config.training.precision, device)
    shape = read_architecture(config, config.encoder)
    torch.manual_seed(0)
    with torch.device(device):
        encoder = WhisperEncoder(shape).to(dtype).requires_grad_(False).eval()
        model = AutoModelForCausalLM.from_config(read_architecture(config, config.llm), dtype=dtype)
    model.requires_grad_(False).eval()
    width, scale = model.get_input_embeddings().embedding_dim, embedding_scale(model)
    settings = config.projector
    projector = Projector.for_models(settings, shape.d_model, width, scale).to(device)

    window = 2 * shape.max_source_positions  # mel frames
    frames = min(window, round(100 * seconds))  # Whisper's hop is 10 ms
    texts = [torch.randint(10, 500, (words,)).tolist() for _ in range(batch)]
    llm = Llm(model, None, (), tuple(range(20, 26)), 0, 0)
    mels = torch.randn(batch, shape.num_mel_bins, window, device=device)
    with torch.no_grad(), arithmetic(device, dtype):
        states, lengths = encode(encoder, mels[..., :frames], torch.full((batch,), frames, device=device))

    with lora(llm, rank, config.llm, seed=0) as adapted:
        slam = SpeechLlm(projector, llm, adapted)
        slam.model.train()
        optimizer = torch.optim.AdamW(trainable(slam).values(), lr=1e-4)

        def ours() -> Tensor:
            with attention_for_training(device):
                return slam.loss(states, lengths, texts)

        def plain() -> Tensor:
            with torch.no_grad():
                everything = encoder(mels.to(dtype)).last_hidden_state
            prefix, mask = slam.prefix(everything, torch.full((batch,), everything.shape[1], device=device))
            text = torch.tensor(texts, device=device)
            embedded = model.get_input_embeddings()(text).to(prefix.dtype)
            mask = torch.cat([mask, mask.new_ones(text.shape)], 1)
            logits = adapted(inputs_embeds=torch.cat([prefix, embedded], 1), attention_mask=mask, use_cache=False).logits
            labels = torch.cat([text.new_full(prefix.shape[:2], -100), text], 1)
            return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())

        def step(loss: Callable[[], Tensor]) -> None:
            with arithmetic(device, dtype):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(trainable(slam).values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        sides = {"plain loop": plain, "ours": ours}
        taken: dict[str, list[float]] = {side: [] for side in sides}
        operations, memory = {}, {}
        for side, loss in sides.items():
            with FlopCounterMode(display=False) as counter:
                step(loss)
            operations[side] = counter.get_total_flops()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                step(loss)
                memory[side] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"
        for _ in range(steps):
            for side, loss in sides.items():
                taken[side].append(timed(lambda loss=loss: step(loss), device))

    peak, source = peak_of(device, dtype)
    positions = {"plain loop": shape.max_source_positions, "ours": states.shape[1]}
    table = Table(title=f"{config.name}: batch {batch}, {seconds:g} s of audio, {words} tokens of text, rank {rank}, {dtype}")
    for column in ("", *sides, "ratio"):
        table.add_column(column, justify="right")
    median = {side: statistics.median(taken[side]) for side in sides}
    tokens = {side: batch * (-(-positions[side] // settings.stack) + len(llm.prompt) + words) for side in sides}
    table.add_row("step, s", *(f"{median[s]:.4f}" for s in sides), f"{median['plain loop'] / median['ours']:.1f}")
    table.add_row("LLM tokens a step", *(f"{tokens[s]:,}" for s in sides))
    table.add_row("LLM tokens a second", *(f"{tokens[s] / median[s]:,.0f}" for s in sides))
    table.add_row("operations a step, 10^12", *(f"{operations[s] / 1e12:.3f}" for s in sides))
    table.add_row("share of the peak, %", *(f"{100 * operations[s] / median[s] / peak:.1f}" for s in sides))
    if memory:
        table.add_row("peak memory, GiB", *(memory[s] for s in sides))
    table.add_row("1,000 steps, min", *(f"{median[s] * 1000 / 60:.1f}" for s in sides))
    console = Console(width=110)
    console.print(table)
    console.print(f"peak: {peak / 1e12:.2f} x 10^12 operations a second ({source}); medians of {steps} steps of each, in turns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of audio in each utterance")
    parser.add_argument("--words", type=int, default=40, help="tokens of text in each utterance")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    main(**vars(parser.parse_args()))
