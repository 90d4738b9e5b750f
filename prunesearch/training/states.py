"""Frozen means computed once: the encoder's shared prefix per study, the rest of it per candidate.

A `StateStore` holds one (T, D) state sequence per utterance in one memory-mapped file, so that a corpus' states need
not fit in memory. Shapes: B batch, F frames, T positions, D width.
"""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import embed, run_layers
from prunesearch.model.llm import sent_to
from prunesearch.speech.audio import SAMPLE_RATE, AudioError, padded, read_audio, version_of
from prunesearch.speech.corpus import Progress, Utterance
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import locked
from prunesearch.study.record import write_atomically
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.process_group import ProcessGroup

ENCODING_BATCH = 32
T = TypeVar("T")
R = TypeVar("R")


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
        return states.to(device), torch.tensor(lengths, device=device)


@dataclass(frozen=True)
class Fetched:
    """A step's batch, and the states of this process' share of it."""

    batch: Sequence[int]
    share: Sequence[int]
    states: Tensor  # (B, T, D)
    lengths: Tensor  # (B,)
    positions: list[int]  # the same, for the host

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows, cut to the longest of them: (b, t, D), (b,)."""
        return self.states[rows, : max(self.positions[rows])], self.lengths[rows]


@dataclass(frozen=True)
class Prefetched:
    """Steps and their batches from the step `first` on; a GPU never waits for them."""

    states: StateStore
    batches: Sequence[Sequence[int]]
    first: int
    team: ProcessGroup

    def __iter__(self) -> Iterator[tuple[int, Fetched]]:
        steps = range(self.first, len(self.batches))
        return zip(steps, ahead(self._read, steps, self.team.device, threads=1), strict=True)

    def _read(self, step: int) -> Fetched:
        batch = self.batches[step]
        share = self.team.share(batch)
        if not share:
            return Fetched(batch, share, self.states.values.new_zeros(0, 0, 0), torch.zeros(0), [])
        hidden, lengths = self.states.batch(share, torch.device("cpu"))
        device = self.team.device
        return Fetched(batch, share, sent_to(device, hidden), sent_to(device, lengths), lengths.tolist())


def ahead(work: Callable[[T], R], items: Iterable[T], device: torch.device, threads: int) -> Iterator[R]:
    """`work` done on each item, in order; for a GPU, in threads, while it computes on the item before.

    A CPU has nothing to gain from it: the other threads' OpenMP teams would only get in the way of the first one's.
    """
    if device.type == "cpu":
        yield from map(work, items)
        return
    upcoming: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            upcoming.append(pool.submit(work, item))
            if len(upcoming) > threads:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()


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
    recordings = [(u.id, version_of(u.audio)) for u in utterances]
    digest = hashlib.sha256(json.dumps([depth, str(dtype), config.data.pad_to_seconds, recordings]).encode())
    for weight in [encoder.conv1.weight, *(layer.fc1.weight for layer in encoder.layers[:depth])]:
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def log_mel(extractor: Any, utterance: Utterance, pad_to_seconds: float | None, device: torch.device) -> Tensor:
    """(M, F), by the checkpoint's own feature extractor, of the recording alone: no padding to 30 s.

    Computed on `device`, handed out on the CPU. Raises StudyError naming a recording that cannot be read.
    """
    try:
        samples = padded(read_audio(utterance.audio), pad_to_seconds)
    except AudioError as error:
        raise StudyError([f"utterance {utterance.id}: {error}"]) from None
    out = extractor(
        samples, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="pt", device=str(device)
    )
    return out["input_features"][0]


@torch.no_grad()
def prefix_states(
    folder: Path,
    split: str,
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

    They are kept in `folder`; the other workers of the study wait for them. What is in memory at once is a batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(wanted)
    name = f"{split}-{_identity(encoder, depth, dtype, config, [utterances[i] for i in order])}"
    index_file, values_file = folder / f"{name}.json", folder / f"{name}.states"
    width = encoder.config.d_model
    with locked(folder / f"{name}.lock", lambda: progress(f"waiting for the states of {split}", 0, 1)):
        if not index_file.exists():
            batches = [[order[j] for j in b] for b in by_length([utterances[i].seconds for i in order], ENCODING_BATCH)]

            def features_of(batch: list[int]) -> list[Tensor]:
                return [log_mel(extractor, utterances[i], config.data.pad_to_seconds, device) for i in batch]

            lengths: dict[int, int] = {}  # in the order of the file
            unfinished = folder / f"{name}.partial"  # a killed worker's is begun anew
            with unfinished.open("wb") as scratch:
                for done, (batch, mels) in enumerate(zip(batches, ahead(features_of, batches, device, threads=4), strict=True)):
                    frames = torch.tensor([m.shape[1] for m in mels], device=device)
                    features = torch.zeros(len(batch), mels[0].shape[0], int(frames.max()))
                    for row, mel in zip(features, mels, strict=True):
                        row[:, : mel.shape[1]] = mel
                    with arithmetic(device, dtype):
                        hidden, positions = embed(encoder, features.to(device), frames)
                        hidden = run_layers(encoder, hidden, positions, 0, depth)
                    lengths |= zip(batch, positions.tolist(), strict=True)
                    for row, i in zip(hidden.to("cpu", dtype), batch, strict=True):
                        scratch.write(row[: lengths[i]].contiguous().view(torch.uint8).numpy().tobytes())
                    progress(f"log-mels and first layers of {split}", done, len(batches))
            unfinished.replace(values_file)
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
    dtype = prefix.values.dtype
    size = sum(lengths.values()) * prefix.values.shape[1] * dtype.itemsize
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is an OSError now, not a SIGBUS later
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(handle)
    values = _mapped(path, sum(lengths.values()), prefix.values.shape[1], dtype)
    os.unlink(path)
    batches = by_length([lengths[i] for i in order], ENCODING_BATCH)
    for done, batch in enumerate(batches):
        indices = [order[j] for j in batch]
        hidden, positions = prefix.batch(indices, device)
        with arithmetic(device, dtype):
            hidden = encoder.layer_norm(run_layers(encoder, hidden, positions, depth))
        for row, i in zip(hidden.to("cpu", dtype), indices, strict=True):
            first, length = spans[i]
            values[first : first + length] = row[:length]
        progress("encoding", done, len(batches))
    return StateStore(values, spans)
