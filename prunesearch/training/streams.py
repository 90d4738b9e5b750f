"""The stream of states through an encoder's layers, on the utterances that repairs are fitted on.

Shapes: B batch, T positions, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import behind_attention, behind_feed_forward
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.states import StateStore, nameless_store

BATCH = 32
KEPT_BYTES = 8 * 2**30  # the unpruned encoder's streams are kept for the next candidate if they are not larger than this


@dataclass(frozen=True)
class FitSet:
    """Utterances of train that a repair is fitted on, in batches of similar length, and those that its ridge is chosen on."""

    fit: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, seconds: Sequence[float], drawn: Sequence[int], held_out: Sequence[int]) -> "FitSet":
        """`seconds`: of every utterance of train; `drawn`: those that are used; `held_out`: some of these."""

        def batches(indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(indices[i] for i in b) for b in by_length([seconds[i] for i in indices], BATCH))

        left_out = set(held_out)
        return cls(batches([i for i in drawn if i not in left_out]), batches(held_out))

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        return self.fit + self.held_out

    @property
    def indices(self) -> list[int]:
        return sorted(i for batch in self.batches for i in batch)


@dataclass
class Streams:
    """The unpruned encoder's streams: before every layer, and behind every layer's attention. Each is computed once.

    `start`: the stream before layer `first`, which no candidate changes. `check`: called often; may raise Interrupted.
    """

    encoder: WhisperEncoder
    fit_set: FitSet
    start: StateStore
    first: int
    scratch: Path
    device: torch.device
    check: Callable[[], None]
    _before: dict[int, StateStore] = field(default_factory=dict)
    _behind_attention: dict[int, StateStore] = field(default_factory=dict)

    def before(self, layer: int) -> StateStore:
        """The stream before a layer; with the number of layers, the stream behind the last one."""
        if layer == self.first:
            return self.start
        if layer not in self._before:
            below = self.behind_attention(layer - 1)
            self._before[layer] = self.map(partial(behind_feed_forward, self.encoder.layers[layer - 1]), below)
            self._drop_below(layer)
        return self._before[layer]

    def behind_attention(self, layer: int) -> StateStore:
        """The stream behind a layer's attention, before its feed-forward part."""
        if layer not in self._behind_attention:
            below = self.before(layer)
            self._behind_attention[layer] = self.map(partial(behind_attention, self.encoder.layers[layer]), below)
        return self._behind_attention[layer]

    def map(self, function: Callable[..., Tensor], *streams: StateStore) -> StateStore:
        """A new stream: the function of the streams' states of a batch (B, T, D), and their lengths (B,)."""
        out = nameless_store(self.scratch, {i: streams[0].length(i) for i in self.fit_set.indices}, streams[0])
        for batch in self.fit_set.batches:
            with arithmetic(self.device, out.values.dtype):
                out.write(batch, function(*self.read(batch, streams)))
            self.check()
        return out

    def read(self, batch: Sequence[int], streams: Sequence[StateStore]) -> list[Tensor]:
        """The streams' states of a batch (B, T, D), and their lengths (B,)."""
        read = [stream.batch(batch, self.device) for stream in streams]
        return [*(states for states, _ in read), read[0][1]]

    def _drop_below(self, layer: int) -> None:
        """Forget the streams below a layer, if all streams together are too large to be kept."""
        positions = sum(self.start.length(i) for i in self.fit_set.indices)
        size = positions * self.start.values.shape[1] * self.start.values.dtype.itemsize
        if 2 * size * (len(self.encoder.layers) - self.first) > KEPT_BYTES:
            for kept in (self._before, self._behind_attention):
                for lower in [i for i in kept if i < layer]:
                    del kept[lower]
