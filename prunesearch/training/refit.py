"""Refitting single linear maps to the unpruned encoder's streams. `repair` says which maps, and in which order.

Shapes: B batch, T positions, D width.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.model.system import SpeechEncoder, SpeechProjector
from prunesearch.training.device import arithmetic
from prunesearch.training.ridge import LADDER, NormalEquations, Solution, solve
from prunesearch.training.states import StateStore
from prunesearch.training.streams import Batches, Stream, Streams

Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs of a map (B, T, I), what it should put out (B, T, O), and lengths (B,)."""


@dataclass(frozen=True)
class Refit:
    """Refits maps in place. `ladder`: ridges that are tried."""

    streams: Streams
    dtype: torch.dtype
    ladder: Sequence[float] = LADDER

    @property
    def encoder(self) -> SpeechEncoder:
        """The unpruned encoder."""
        return self.streams.encoder

    def attention(self, number: int, layer: Any, heads: Stream, stream: Stream) -> Solution:
        """Refit a layer's `out_proj`, so that the stream behind its attention becomes what it is in the unpruned encoder."""
        target = self.streams.behind_attention(number)
        return self._fit(self.encoder.attention_map(layer), _attention_rows, heads, target, stream)

    def feed_forward(self, layer: Any, middle: Stream, following: int) -> Solution:
        """Refit a layer's `fc2`, so that the stream becomes what it is before layer `following` of the unpruned encoder."""
        rows = partial(_feed_forward_rows, self.encoder, layer)
        return self._fit(self.encoder.feed_forward_map(layer), rows, middle, self.streams.before(following))

    def projector(self, projector: SpeechProjector, behind: Stream) -> Solution:
        """Refit a projector's first map. `behind`: the stream behind the pruned encoder's last layer."""
        full = self.streams.before(self.encoder.depth)
        rows = partial(_projector_rows, projector, copy.deepcopy(projector.entry), self.encoder)
        solution = self._fit(projector.entry, rows, behind, full)
        projector.fold()
        return solution

    def _fit(self, linear: nn.Linear, rows: Callable[..., Rows], *streams: Stream) -> Solution:
        """`rows`: of the streams' states of a batch, and their lengths."""
        stores = [stream[0] for stream in streams]
        fit, held_out = (self._sums(linear, rows, batches, stores) for batches in (self.streams.fit, self.streams.held_out))
        solution = solve(fit, held_out, self.ladder)
        linear.weight.data = solution.weight.to(linear.weight.dtype)
        if solution.bias is not None:
            linear.bias.data = solution.bias.to(linear.bias.dtype)
        return solution

    def _sums(
        self, linear: nn.Linear, rows: Callable[..., Rows], batches: Batches, stores: Sequence[StateStore]
    ) -> NormalEquations:
        sums = NormalEquations(linear)
        for batch in batches:
            with arithmetic(self.streams.device, self.dtype):
                inputs, outputs, lengths = rows(*self.streams.read(batch, stores))
            inside = torch.arange(inputs.shape[1], device=lengths.device) < lengths[:, None]
            sums.add(inputs[inside], outputs[inside])
            self.streams.check()
        return sums

    # Streams through one layer

    def heads(self, layer: Any, stream: Stream) -> Stream:
        """What the layer's `out_proj` reads."""
        return self.streams.map(partial(self.encoder.attention_heads, layer), stream)

    def behind_attention(self, layer: Any, heads: Stream, stream: Stream) -> Stream:
        return self.streams.map(lambda h, read, lengths: self.encoder.add_attention(layer, h, read), stream, heads)

    def behind_feed_forward(self, layer: Any, middle: Stream) -> Stream:
        return self.streams.map(lambda m, lengths: self.encoder.behind_feed_forward(layer, m), middle)

    def behind_layer(self, layer: Any, stream: Stream) -> Stream:
        """Through a layer that is not refitted."""
        encoder = self.encoder

        def through(hidden: Tensor, lengths: Tensor) -> Tensor:
            return encoder.behind_feed_forward(layer, encoder.behind_attention(layer, hidden, lengths))

        return self.streams.map(through, stream)


# The rows that maps are refitted on


def _attention_rows(heads: Tensor, middle: Tensor, hidden: Tensor, lengths: Tensor) -> Rows:
    """`out_proj` should add to the pruned stream what leads to the unpruned stream behind the attention."""
    return heads, middle.float() - hidden.float(), lengths


def _feed_forward_rows(encoder: SpeechEncoder, layer: Any, middle: Tensor, target: Tensor, lengths: Tensor) -> Rows:
    """`fc2` should add to the pruned stream what leads to the unpruned stream before the next kept layer."""
    return encoder.activations(layer, middle), target.float() - middle.float(), lengths


def _projector_rows(
    projector: SpeechProjector, before: nn.Linear, encoder: SpeechEncoder, pruned: Tensor, full: Tensor, lengths: Tensor
) -> Rows:
    """The first map should compute from the pruned encoder's states what it computed (`before`) from the unpruned one's."""
    inputs, audio_lengths = projector.inputs(encoder.output(pruned, lengths), lengths)
    with torch.autocast(inputs.device.type, enabled=False):
        wanted = before(projector.inputs(encoder.output(full, lengths), lengths)[0].float())
    return inputs, wanted, audio_lengths
