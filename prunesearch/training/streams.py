"""The stream of states through an encoder's layers, on the utterances that repairs are fitted on.

Shapes: B batch, T positions, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prunesearch.model.system import SpeechEncoder
from prunesearch.training.batches import by_length
from prunesearch.training.device import arithmetic
from prunesearch.training.states import StateStore, nameless_store

BATCH = 32
KEPT_BYTES = 8 * 2**30  # the unpruned encoder's streams are kept for the next candidate if they are not larger than this

Batches = tuple[tuple[int, ...], ...]
Stream = tuple[StateStore, ...]
"""The states of every group of utterances."""


def batches_of(seconds: Sequence[float], indices: Sequence[int]) -> Batches:
    """Utterances in batches of similar length. `seconds`: of every utterance of the split."""
    return tuple(tuple(indices[i] for i in b) for b in by_length([seconds[i] for i in indices], BATCH))


@dataclass(frozen=True)
class Group:
    """Utterances of one split in batches, and their states before the first layer that a candidate may change."""

    start: StateStore
    batches: Batches


@dataclass
class Streams:
    """The unpruned encoder's streams: before every layer, and behind every layer's attention. Each is computed once.

    `fit`: batches that maps are fitted on; `held_out`: those that their ridges are chosen on; both are of the first group of
    utterances. `others`: further groups, whose states are computed only. `first`: the layer that the groups start before.
    `check`: called often; may raise Interrupted.
    """

    encoder: SpeechEncoder
    start: StateStore
    fit: Batches
    held_out: Batches
    first: int
    scratch: Path
    device: torch.device
    check: Callable[[], None]
    others: tuple[Group, ...] = ()
    _before: dict[int, Stream] = field(default_factory=dict)
    _behind_attention: dict[int, Stream] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group(self.start, self.fit + self.held_out), *self.others)

    def before(self, layer: int) -> Stream:
        """The stream before a layer; with the number of layers, the stream behind the last one."""
        if layer == self.first:
            return tuple(group.start for group in self.groups)
        if layer not in self._before:
            below = self.behind_attention(layer - 1)
            self._before[layer] = self.map(self._feed_forward(layer - 1), below)
            self._drop_below(layer)
        return self._before[layer]

    def behind_attention(self, layer: int) -> Stream:
        """The stream behind a layer's attention, before its feed-forward part."""
        if layer not in self._behind_attention:
            below = self.before(layer)
            self._behind_attention[layer] = self.map(partial(self.encoder.behind_attention, self.encoder.layers[layer]), below)
        return self._behind_attention[layer]

    def _feed_forward(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda middle, lengths: self.encoder.behind_feed_forward(self.encoder.layers[layer], middle)

    def map(self, function: Callable[..., Tensor], *streams: Stream) -> Stream:
        """A new stream: the function of the streams' states of a batch (B, T, D), and their lengths (B,)."""
        return tuple(
            self._map(function, group.batches, [stream[place] for stream in streams]) for place, group in enumerate(self.groups)
        )

    def _map(self, function: Callable[..., Tensor], batches: Batches, stores: Sequence[StateStore]) -> StateStore:
        positions, out = {i: stores[0].spans[i][1] for i in sorted(i for batch in batches for i in batch)}, None
        for batch in batches:
            with arithmetic(self.device, stores[0].values.dtype):
                states = function(*self.read(batch, stores))
            out = out or nameless_store(self.scratch, positions, stores[0], states.shape[-1])
            out.write(batch, states)
            self.check()
        return out or nameless_store(self.scratch, positions, stores[0])

    def read(self, batch: Sequence[int], stores: Sequence[StateStore]) -> list[Tensor]:
        """The stores' states of a batch (B, T, D), and their lengths (B,)."""
        read = [store.batch(batch, self.device) for store in stores]
        return [*(states for states, _ in read), read[0][1]]

    def _drop_below(self, layer: int) -> None:
        """Forget the streams below a layer, if all streams together are too large to be kept."""
        positions = sum(group.start.spans[i][1] for group in self.groups for batch in group.batches for i in batch)
        size = positions * self.start.values.shape[1] * self.start.values.dtype.itemsize
        if 2 * size * (len(self.encoder.layers) - self.first) > KEPT_BYTES:
            for kept in (self._before, self._behind_attention):
                for lower in [i for i in kept if i < layer]:
                    del kept[lower]
