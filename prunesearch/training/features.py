"""Frozen means computed once: the encoder's shared prefix per study, the rest of it per candidate.

A `StateStore` holds one (T, D) state sequence per utterance in one memory-mapped file, so that a corpus' states need
not fit in memory. Shapes: B batch, F frames, T positions, D width.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.config import StudyConfig
from prunesearch.mistakes import StudyError
from prunesearch.model.encoder import embed, positions_of, run_layers
from prunesearch.record import write_atomically
from prunesearch.speech.audio import SAMPLE_RATE, AudioError, padded, read_audio, size_of
from prunesearch.speech.corpus import Progress, Utterance
from prunesearch.training.batches import by_length
from prunesearch.training.device import autocast
from prunesearch.training.team import Team

ENCODING_BATCH = 32


@dataclass(frozen=True)
class StateStore:
    """State sequences of utterances, by their index in the corpus."""

    values: Tensor  # (positions of all utterances, D), memory-mapped
    spans: dict[int, tuple[int, int]]  # utterance -> (first position, positions)

    def length(self, index: int) -> int:
        return self.spans[index][1]

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, T, D) padded with zeros, lengths (B,)."""
        lengths = [self.spans[i][1] for i in indices]
        states = self.values.new_zeros(len(indices), max(lengths), self.values.shape[1])
        for row, i in zip(states, indices, strict=True):
            first, length = self.spans[i]
            row[:length] = self.values[first : first + length]
        return states.to(device, non_blocking=True), torch.tensor(lengths, device=device)


@dataclass(frozen=True)
class Fetched:
    """A step's batch, and the states of this process' share of it."""

    batch: Sequence[int]
    share: Sequence[int]
    states: Tensor  # (B, T, D)
    lengths: list[int]

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows, cut to the longest of them: (b, t, D), (b,)."""
        lengths = self.lengths[rows]
        return self.states[rows, : max(lengths)], torch.tensor(lengths, device=self.states.device)


@dataclass(frozen=True)
class Prefetched:
    """Steps and their batches; for a GPU, each is read while the step before it computes, so that it never waits.

    A CPU has nothing to gain from it: the second thread's OpenMP team would only get in the way of the first one's.
    """

    states: StateStore
    batches: Sequence[Sequence[int]]
    first: int
    team: Team

    def __iter__(self) -> Iterator[tuple[int, Fetched]]:
        steps = range(self.first, len(self.batches))
        if self.team.device.type == "cpu":
            yield from ((step, self._read(step)) for step in steps)
            return
        with ThreadPoolExecutor(1) as reader:
            upcoming = [reader.submit(self._read, step) for step in steps[:1]]
            for step in steps:
                fetched = upcoming.pop().result()
                if step + 1 < len(self.batches):
                    upcoming.append(reader.submit(self._read, step + 1))
                yield step, fetched

    def _read(self, step: int) -> Fetched:
        batch = self.batches[step]
        share = self.team.share(batch)
        if not share:
            return Fetched(batch, share, self.states.values.new_zeros(0, 0, 0), [])
        device = self.team.device
        hidden, lengths = self.states.batch(share, torch.device("cpu"))
        if device.type == "cuda":
            hidden = hidden.pin_memory()
        return Fetched(batch, share, hidden.to(device, non_blocking=True), lengths.tolist())


def _mapped(path: str | Path, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=positions * width, dtype=dtype).view(positions, width)


def _spans(lengths: dict[int, int]) -> dict[int, tuple[int, int]]:
    spans, first = {}, 0
    for index, length in lengths.items():
        spans[index] = (first, length)
        first += length
    return spans


def _identity(
    encoder: WhisperEncoder, depth: int, dtype: torch.dtype, config: StudyConfig, utterances: Sequence[Utterance]
) -> str:
    """Names what cached states depend on: precision, layers and their weights, recordings and their padding."""
    recordings = [(u.id, size_of(u.audio)) for u in utterances]
    digest = hashlib.sha256(json.dumps([depth, str(dtype), config.data.pad_to_seconds, recordings]).encode())
    for weight in [encoder.conv1.weight, *(layer.fc1.weight for layer in encoder.layers[:depth])]:
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def log_mel(extractor: Any, utterance: Utterance, pad_to_seconds: float | None) -> Tensor:
    """(M, F), by the checkpoint's own feature extractor, of the recording alone: no padding to 30 s.

    Raises StudyError naming a recording that cannot be read.
    """
    try:
        samples = padded(read_audio(utterance.audio), pad_to_seconds)
    except AudioError as error:
        raise StudyError([f"utterance {utterance.id}: {error}"]) from None
    out = extractor(samples, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="pt")
    return out["input_features"][0]


@torch.no_grad()
def prefix_states(
    folder: Path,
    name: str,
    utterances: Sequence[Utterance],
    wanted: Iterable[int],
    encoder: WhisperEncoder,
    depth: int,
    extractor: Any,
    config: StudyConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> StateStore:
    """States after the convolutions and the first `depth` layers, computed by the first worker that needs them.

    `name` is the split's. They are kept in `folder`; the other workers of the study wait for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(wanted)
    name = f"{name}-{_identity(encoder, depth, dtype, config, [utterances[i] for i in order])}"
    index_file, values_file = folder / f"{name}.json", folder / f"{name}.states"
    width = encoder.config.d_model
    with FileLock(folder / f"{name}.lock"):
        if not index_file.exists():
            mels = []
            for done, i in enumerate(order):
                mels.append(log_mel(extractor, utterances[i], config.data.pad_to_seconds).to(torch.float16))
                if done % 20 == 0:
                    progress(f"log-mels of {name}", done, len(order))
            lengths = {i: int(positions_of(torch.tensor(m.shape[1]))) for i, m in zip(order, mels, strict=True)}
            spans = _spans(lengths)
            handle, scratch = tempfile.mkstemp(dir=folder)
            os.close(handle)
            values = _mapped(scratch, sum(lengths.values()), width, dtype)
            batches = by_length([m.shape[1] for m in mels], ENCODING_BATCH)
            for done, batch in enumerate(batches):
                frames = torch.tensor([mels[j].shape[1] for j in batch], device=device)
                features = torch.zeros(len(batch), mels[0].shape[0], int(frames.max()))
                for row, j in zip(features, batch, strict=True):
                    row[:, : mels[j].shape[1]] = mels[j]
                with autocast(device, dtype):
                    hidden, positions = embed(encoder, features.to(device), frames)
                    hidden = run_layers(encoder, hidden, positions, 0, depth)
                for row, j in zip(hidden.to("cpu", dtype), batch, strict=True):
                    first, length = spans[order[j]]
                    values[first : first + length] = row[:length]
                progress(f"first layers on {name}", done, len(batches))
            os.replace(scratch, values_file)
            write_atomically(index_file, json.dumps(lengths))
    spans = _spans({int(i): n for i, n in json.loads(index_file.read_text()).items()})
    return StateStore(_mapped(values_file, sum(n for _, n in spans.values()), width, dtype), spans)


@torch.no_grad()
def finish_encoding(
    prefix: StateStore,
    encoder: WhisperEncoder,
    depth: int,
    wanted: Iterable[int],
    scratch: Path,
    device: torch.device,
    progress: Progress,
) -> StateStore:
    """The encoder's output for some utterances: what stands behind the prefix, once per candidate, not once per epoch.

    `encoder` is the pruned one; its first `depth` layers are the prefix's. The file is nameless: it goes with the store.
    """
    order = sorted(set(wanted))
    lengths = {i: prefix.length(i) for i in order}
    spans = _spans(lengths)
    scratch.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=scratch)
    os.close(handle)
    dtype = prefix.values.dtype
    values = _mapped(path, sum(lengths.values()), prefix.values.shape[1], dtype)
    os.unlink(path)
    batches = by_length([lengths[i] for i in order], ENCODING_BATCH)
    for done, batch in enumerate(batches):
        indices = [order[j] for j in batch]
        hidden, positions = prefix.batch(indices, device)
        with autocast(device, dtype):
            hidden = encoder.layer_norm(run_layers(encoder, hidden, positions, depth))
        for row, i in zip(hidden.to("cpu", dtype), indices, strict=True):
            first, length = spans[i]
            values[first : first + length] = row[:length]
        progress("encoding", done, len(batches))
    return StateStore(values, spans)
