"""A training step of models at full size, with random weights: seconds, tokens per second, share of the peak, memory.

    python benchmarks/scale.py studies/paper/large-v2-da.toml [--batch 8] [--seconds 8] [--words 40] [--rank 8]

The study file names the architectures. Weights are random, because they do not change the speed; nothing is downloaded. "Ours"
is a candidate's training step: encoder states come from the cache, and logits are computed for the text only. The plain loop
pads audio to Whisper's window, runs the encoder in every step, and computes logits at every position. The two loops run
alternately; the table shows medians.

torch counts the operations that a step executes (matrix products and attention). The share of the peak includes operations on
padding: it says how busy the device was. To compare the two loops, use the seconds per step.

Shapes: B batch, M mel bins, T encoder positions, D width.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_loop import plain_loss
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import WhisperLayers
from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.model.hub import read_architecture
from prunesearch.model.llm import Llm, embedding_scale, lora
from prunesearch.model.projector import Projector
from prunesearch.model.system import Target
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.training.device import (
    arithmetic,
    attention_for_training,
    peak_memory_bytes,
    pick_dtype,
    reset_peak_memory,
)
from prunesearch.training.finetune import trainable
from prunesearch.training.process_group import ProcessGroup

# Dense bf16 operations per second, from NVIDIA's data sheets
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
FRAMES_PER_SECOND = 100  # Whisper's mel frames


@dataclass(frozen=True)
class Workload:
    """What one training step processes: `batch` utterances of `seconds` of audio and `words` text tokens; LoRA's rank."""

    batch: int
    seconds: float
    words: int
    rank: int


@dataclass(frozen=True)
class Models:
    """A study's models with random weights, and where they compute."""

    encoder: WhisperLayers
    llm: Llm
    projector: Projector
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def random(cls, config: StudyConfig, device: torch.device, dtype: torch.dtype) -> "Models":
        torch.manual_seed(0)
        architecture = read_architecture(config, config.slam.encoder)
        with torch.device(device):
            encoder = WhisperEncoder(architecture).to(dtype).requires_grad_(False).eval()
            model = AutoModelForCausalLM.from_config(read_architecture(config, config.slam.llm), dtype=dtype)
        model.requires_grad_(False).eval()
        width = model.get_input_embeddings().embedding_dim
        projector = Projector.for_models(config.slam.projector, architecture.d_model, width, embedding_scale(model)).to(device)
        prompt = tuple(range(20, 26))  # six tokens
        return cls(WhisperLayers(encoder, None), Llm(model, None, (), prompt, 0, 0), projector, device, dtype)


@dataclass(frozen=True)
class Inputs:
    """A batch: features (B, M, window), cached encoder states (B, T, D) of these lengths (B,), and B texts as token ids."""

    mels: Tensor
    states: Tensor
    lengths: Tensor
    texts: list[Target]

    @classmethod
    def random(cls, models: Models, work: Workload) -> "Inputs":
        window = 2 * models.encoder.module.config.max_source_positions  # mel frames
        frames = min(window, round(FRAMES_PER_SECOND * work.seconds))
        texts = [Target(torch.randint(10, 500, (work.words,)).tolist()) for _ in range(work.batch)]
        mels = torch.randn(work.batch, models.encoder.module.config.num_mel_bins, window, device=models.device)
        with torch.no_grad(), arithmetic(models.device, models.dtype):
            lengths = torch.full((work.batch,), frames, device=models.device)
            states, lengths = models.encoder.encode(mels[..., :frames], lengths)
        return cls(mels, states, lengths, texts)


def loss_at_full_window(models: Models, slam: SpeechLlm, inputs: Inputs) -> Tensor:
    """The plain loop's loss."""
    with torch.no_grad():
        states = models.encoder.module(inputs.mels.to(models.dtype)).last_hidden_state
    lengths = torch.full((len(inputs.texts),), states.shape[1], device=models.device)
    return plain_loss(slam, states, lengths, inputs.texts)


def loss_from_cache(models: Models, slam: SpeechLlm, inputs: Inputs) -> Tensor:
    """Our loss."""
    with attention_for_training(models.device):
        return slam.loss(inputs.states, inputs.lengths, inputs.texts)


LOOPS: dict[str, Callable[[Models, SpeechLlm, Inputs], Tensor]] = {"plain loop": loss_at_full_window, "ours": loss_from_cache}


class Trainer:
    """Training steps of one system on one batch."""

    def __init__(self, models: Models, inputs: Inputs, adapted: Any):
        self.models, self.inputs = models, inputs
        self.slam = SpeechLlm(models.projector, models.llm, adapted)
        self.slam.model.train()
        self._weights = list(trainable(self.slam).values())
        self._optimizer = torch.optim.AdamW(self._weights, lr=1e-4)

    def step(self, loop: str) -> None:
        with arithmetic(self.models.device, self.models.dtype):
            loss = LOOPS[loop](self.models, self.slam, self.inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


@dataclass(frozen=True)
class Measured:
    """Median seconds of a step, the operations that it executes, and its peak memory on a GPU."""

    seconds: float
    operations: int
    memory_bytes: int | None


def measure(trainer: Trainer, steps: int) -> dict[str, Measured]:
    """Each loop, by name: operations and memory of one step each, then `steps` timed steps of each, alternately."""
    device = trainer.models.device
    operations: dict[str, int] = {}
    memory: dict[str, int] = {}
    for loop in LOOPS:
        with FlopCounterMode(display=False) as counter:
            trainer.step(loop)
        operations[loop] = counter.get_total_flops()
        if device.type == "cuda":
            reset_peak_memory(device)
            trainer.step(loop)
            memory[loop] = peak_memory_bytes(device)
    seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for _ in range(steps):
        for loop in LOOPS:
            seconds[loop].append(timed(lambda loop=loop: trainer.step(loop), device))
    return {loop: Measured(statistics.median(seconds[loop]), operations[loop], memory.get(loop)) for loop in LOOPS}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, including what it leaves to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak in operations per second, and the source of the figure: a data sheet, or a large matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if found := next((peak for card, peak in BF16_PEAK.items() if card in name), None):
            return found, f"data sheet of {name}"
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = statistics.median(timed(lambda: a @ a, device) for _ in range(9))
    return 2 * 2048**3 / seconds, "measured: a product of 2,048 x 2,048 matrices"


def show(title: str, measured: dict[str, Measured], tokens: dict[str, int], peak: float, console: Console) -> None:
    """Print the table. `tokens`: tokens that the LLM reads in a step, by loop."""
    table = Table(title=title)
    for column in ("", *measured, "ratio"):
        table.add_column(column, justify="right")
    loops = list(measured.values())
    table.add_row("step, s", *(f"{m.seconds:.4f}" for m in loops), f"{loops[0].seconds / loops[1].seconds:.1f}")
    table.add_row("LLM tokens per step", *(f"{tokens[loop]:,}" for loop in measured))
    table.add_row("LLM tokens per second", *(f"{tokens[loop] / m.seconds:,.0f}" for loop, m in measured.items()))
    table.add_row("operations per step, 10^12", *(f"{m.operations / 1e12:.3f}" for m in loops))
    table.add_row("share of the peak, %", *(f"{100 * m.operations / m.seconds / peak:.1f}" for m in loops))
    if all(m.memory_bytes for m in loops):
        table.add_row("peak memory, GiB", *(f"{(m.memory_bytes or 0) / 2**30:.1f}" for m in loops))
    table.add_row("1,000 steps, min", *(f"{m.seconds * 1000 / 60:.1f}" for m in loops))
    console.print(table)


def main(study: Path, work: Workload, steps: int) -> None:
    config = load_study(study, data_must_exist=False)
    device = ProcessGroup.join().device
    models = Models.random(config, device, pick_dtype(config.training.precision, device))
    inputs = Inputs.random(models, work)
    with lora(models.llm.model, work.rank, config.slam.llm, seed=0) as adapted:
        measured = measure(Trainer(models, inputs, adapted), steps)
    positions = {"plain loop": models.encoder.module.config.max_source_positions, "ours": inputs.states.shape[1]}
    prompt, stack = len(models.llm.prompt), config.slam.projector.stack
    tokens = {loop: work.batch * (-(-positions[loop] // stack) + prompt + work.words) for loop in LOOPS}
    peak, source = peak_of(device, models.dtype)
    console = Console(width=110)
    what = f"batch {work.batch}, {work.seconds:g} s of audio, {work.words} tokens of text, rank {work.rank}, {models.dtype}"
    show(f"{config.name}: {what}", measured, tokens, peak, console)
    console.print(f"peak: {peak / 1e12:.2f} x 10^12 operations per second ({source})")
    console.print(f"medians of {steps} steps of each loop, run alternately")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--batch", type=int, default=8, help="utterances in a step")
    parser.add_argument("--seconds", type=float, default=8.0, help="audio of each utterance")
    parser.add_argument("--words", type=int, default=40, help="text tokens of each utterance")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each loop")
    a = parser.parse_args()
    main(a.study, Workload(a.batch, a.seconds, a.words, a.rank), a.steps)
