"""Frozen layers are computed once: the encoder's shared prefix once per study, the layers above it once per candidate.

A `StateStore` holds one (T, D) state sequence per utterance in one memory-mapped file, so that the states of a corpus need not
fit in memory. Shapes: B batch, M mel bins, F frames, T positions, D width.
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
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunesearch.model.llm import sent_to
from prunesearch.model.system import SpeechEncoder
from prunesearch.speech.audio import AudioError, padded, read_audio, version_of
from prunesearch.speech.corpus import Utterance
from prunesearch.study.errors import StudyError
from prunesearch.study.files import naming, read_unless_damaged, write_atomically
from prunesearch.study.interrupt import locked
from prunesearch.study.progress import print_note
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.process_group import ProcessGroup

ENCODING_BATCH = 32
T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StateStore:
    """State sequences of utterances, by their index in the corpus."""

    values: Tensor  # (positions of all utterances, D), memory-mapped
    spans: dict[int, tuple[int, int]]  # utterance -> (first position, number of positions that are kept)
    lengths: dict[int, int]  # utterance -> number of positions that are read

    def length(self, index: int) -> int:
        return self.lengths[index]

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, T, D) padded with zeros, lengths (B,)."""
        lengths = [self.lengths[i] for i in indices]
        states = self.values.new_zeros(len(indices), max(self.spans[i][1] for i in indices), self.values.shape[1])
        for row, i in zip(states, indices, strict=True):
            first, length = self.spans[i]
            row[:length] = self.values[first : first + length]
        return states.to(device), torch.tensor(lengths, device=device)

    def write(self, indices: Sequence[int], states: Tensor) -> None:
        """Keep the states (B, T, D) of some utterances, each cut to its length."""
        for row, i in zip(states.to("cpu", self.values.dtype), indices, strict=True):
            first, length = self.spans[i]
            self.values[first : first + length] = row[:length]


@dataclass(frozen=True)
class Fetched:
    """A step's batch, and the states of this process's shard of it."""

    batch: Sequence[int]
    shard: Sequence[int]
    states: Tensor  # (B, T, D)
    lengths: Tensor  # (B,)
    positions: list[int]  # the lengths, on the host

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows, cut to the longest of them: (b, t, D), (b,)."""
        return self.states[rows, : max(self.positions[rows])], self.lengths[rows]


@dataclass(frozen=True)
class Prefetched:
    """Yields steps and their batches, from step `first` on; for a GPU, the next batch is read while it computes."""

    states: StateStore
    batches: Sequence[Sequence[int]]
    first: int
    group: ProcessGroup

    def __iter__(self) -> Iterator[tuple[int, Fetched]]:
        steps = range(self.first, len(self.batches))
        return zip(steps, ahead(self._read, steps, self.group.device, threads=1), strict=True)

    def _read(self, step: int) -> Fetched:
        batch = self.batches[step]
        shard = self.group.shard(batch)
        if not shard:
            return Fetched(batch, shard, self.states.values.new_zeros(0, 0, 0), torch.zeros(0), [])
        hidden, lengths = self.states.batch(shard, torch.device("cpu"))
        device = self.group.device
        return Fetched(batch, shard, sent_to(device, hidden), sent_to(device, lengths), lengths.tolist())


def ahead(work: Callable[[T], R], items: Iterable[T], device: torch.device, threads: int) -> Iterator[R]:
    """`work` applied to each item, in order. For a GPU, threads work ahead while it computes on the item before.

    A CPU gains nothing from that: more threads would only compete with those that compute.
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


# From samples to encoder states: the one way that studies and exported systems take.


def features_of(
    encoder: SpeechEncoder, samples: NDArray[np.float32], pad_to_seconds: float | None, device: torch.device
) -> Tensor:
    """What the encoder reads of one recording, padded with silence to a multiple of `pad_to_seconds`: (M, F) on the CPU,
    computed on `device`."""
    return encoder.features(padded(samples, pad_to_seconds), device)


def batch_of(mels: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Recordings (M, F) -> features (B, M, F) padded with zeros, and the frames of each recording (B,)."""
    frames = torch.tensor([m.shape[1] for m in mels], device=device)
    features = torch.zeros(len(mels), mels[0].shape[0], int(frames.max()))
    for row, mel in zip(features, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    return features.to(device), frames


@dataclass(frozen=True)
class StateCache:
    """Computes and keeps encoder states. `depth`: the number of first layers that all candidates of the study share.

    `models`: the digest of the encoder's weights; states of other weights are never taken for these. `folder` holds the shared
    states of all workers, `scratch` a candidate's own.
    """

    folder: Path
    scratch: Path
    encoder: SpeechEncoder
    depth: int
    pad_to_seconds: float | None
    models: str
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    @torch.no_grad()
    def prefix(self, split: str, utterances: Sequence[Utterance], wanted: Iterable[int]) -> StateStore:
        """States after the convolutions and the first `depth` layers, computed by the first worker that needs them.

        The other workers wait. `wanted`: indices of utterances. One batch is in memory at a time. Raises StudyError for an
        unreadable recording.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        order = sorted(wanted)
        name = f"{split}-{self._identity([utterances[i] for i in order])}"
        index_file, values_file = self.folder / f"{name}.json", self.folder / f"{name}.states"
        with locked(self.folder / f"{name}.lock", lambda: self.progress(f"waiting for the states of {split}", 0, 1)):
            lengths = self._stored_lengths(index_file, values_file, order)
            if lengths is None:
                unfinished = self.folder / f"{name}.partial"  # one that a killed worker left is begun anew
                with naming(unfinished), unfinished.open("wb") as file:
                    lengths = self._write_prefix(file, split, utterances, order)
                unfinished.replace(values_file)
                write_atomically(index_file, json.dumps(lengths))
        spans = _spans(self._computed(lengths))
        values = _mapped(values_file, sum(n for _, n in spans.values()), self.encoder.width, self.dtype)
        return StateStore(values, spans, lengths)

    def _computed(self, lengths: dict[int, int]) -> dict[int, int]:
        """The number of positions that the encoder computes for each utterance."""
        return {i: self.encoder.computed(length) for i, length in lengths.items()}

    def _stored_lengths(self, index_file: Path, values_file: Path, order: list[int]) -> dict[int, int] | None:
        """The lengths of the stored states, in the order of their file; None if states must be computed.

        A damaged index, or states of another size than it says, are computed again. Mapped as it is, a file that was cut off
        would give zeros.
        """
        lengths = read_unless_damaged(index_file, dict[int, int])
        if lengths is None:
            return None
        size = sum(self._computed(lengths).values()) * self.encoder.width * self.dtype.itemsize
        found = values_file.stat().st_size if values_file.exists() else 0
        if sorted(lengths) == order and found == size:
            return lengths
        print_note(f"{values_file}: must have {size} bytes, got {found}: it is made again")
        return None

    def _write_prefix(self, file: BinaryIO, split: str, utterances: Sequence[Utterance], order: list[int]) -> dict[int, int]:
        """Append the utterances' states to the file; returns their lengths, in the order of the file."""
        batches = [[order[j] for j in b] for b in by_length([utterances[i].seconds for i in order], ENCODING_BATCH)]

        def read(batch: list[int]) -> list[Tensor]:
            return [self._features(utterances[i]) for i in batch]

        lengths: dict[int, int] = {}
        for done, (batch, mels) in enumerate(zip(batches, ahead(read, batches, self.device, threads=4), strict=True)):
            with arithmetic(self.device, self.dtype):
                hidden, positions = self.encoder.first_layers(*batch_of(mels, self.device), self.depth)
            lengths |= zip(batch, positions.tolist(), strict=True)
            for row, i in zip(hidden.to("cpu", self.dtype), batch, strict=True):
                file.write(row[: self.encoder.computed(lengths[i])].contiguous().view(torch.uint8).numpy().tobytes())
            self.progress(f"log-mels and first layers of {split}", done, len(batches))
        return lengths

    def _features(self, utterance: Utterance) -> Tensor:
        try:
            return features_of(self.encoder, read_audio(utterance.audio), self.pad_to_seconds, self.device)
        except AudioError as error:
            raise StudyError([f"utterance {utterance.id}: {error}"]) from None

    def _identity(self, utterances: Sequence[Utterance]) -> str:
        """Names what cached states depend on: weights, layers, precision, recordings and their padding."""
        recordings = [(u.id, version_of(u.audio)) for u in utterances]
        settings = [self.models, self.depth, str(self.dtype), self.pad_to_seconds, recordings]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    @torch.no_grad()
    def finish(self, prefix: StateStore, encoder: SpeechEncoder, wanted: Iterable[int]) -> StateStore:
        """The output of a candidate's `encoder` for some utterances: its first `depth` layers are the prefix's.

        The file has no name: it disappears with the store. Raises OSError when the disk is full.
        """
        order = sorted(set(wanted))
        store = nameless_store(self.scratch, {i: prefix.length(i) for i in order}, prefix)
        dtype = prefix.values.dtype
        batches = by_length([prefix.length(i) for i in order], ENCODING_BATCH)
        for done, batch in enumerate(batches):
            indices = [order[j] for j in batch]
            hidden, positions = prefix.batch(indices, self.device)
            with arithmetic(self.device, dtype):
                hidden = encoder.last_layers(hidden, positions, self.depth)
            store.write(indices, hidden)
            self.progress("encoding", done, len(batches))
        return store


def _mapped(path: str | Path, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=positions * width, dtype=dtype).view(positions, width)


def nameless_store(folder: Path, positions: dict[int, int], like: StateStore, width: int | None = None) -> StateStore:
    """An empty store for some utterances of another one, of the same dtype and width (or of another width).

    positions: how many are kept of each utterance.

    Its file disappears with it. Raises OSError when the disk is full.
    """
    values = _nameless_file(folder, sum(positions.values()), width or like.values.shape[1], like.values.dtype)
    return StateStore(values, _spans(positions), {i: like.lengths[i] for i in positions})


def _nameless_file(folder: Path, positions: int, width: int, dtype: torch.dtype) -> Tensor:
    """(positions, width), memory-mapped to a file that is deleted already."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    size = positions * width * dtype.itemsize
    try:
        if size and hasattr(os, "posix_fallocate"):
            with naming(folder):
                os.posix_fallocate(handle, 0, size)  # a full disk is an OSError now, and not a SIGBUS later
        return _mapped(path, positions, width, dtype)
    finally:
        os.close(handle)
        os.unlink(path)


def _spans(lengths: dict[int, int]) -> dict[int, tuple[int, int]]:
    spans, first = {}, 0
    for index, length in lengths.items():
        spans[index] = (first, length)
        first += length
    return spans
