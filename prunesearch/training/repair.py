"""Closed-form repair: what removed layers cost is computed by least squares, without training and without transcripts.

In every encoder layer, two linear maps write into the stream: the attention's `out_proj` and the feed-forward's `fc2`. From the
lowest cut upwards, both are refitted in each kept layer, so that the stream of the pruned encoder becomes again what the unpruned
encoder has at that depth. With X_i the unpruned stream before layer i, M_i the unpruned stream behind layer i's attention, h the
pruned stream so far, and j the next kept layer after i (or the end of the encoder):

    out_proj  <-  ridge regression from the concatenated heads to     M_i - h     (in layers above the lowest cut)
    m = h + attention(h)
    fc2       <-  ridge regression from GELU(fc1(LayerNorm(m))) to    X_j - m
    h = m + fc2(...)

At the end, the projector's first linear map is refitted in the same way to what it computed from the unpruned encoder. No parameter
is added; the result is a plain Whisper encoder. It follows from the layer set, the recordings and the ridge: it can be made again at
any time. Sources: ReplaceMe (arXiv 2505.02819) puts one linear map in place of a run of LLM blocks, by least squares.

Shapes: B batch, T positions, D width, N valid positions of a batch.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import padding_mask, remove_layers
from prunesearch.model.projector import Projector
from prunesearch.study.candidate import Candidate
from prunesearch.training.batches import by_length
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic
from prunesearch.training.ridge import NormalEquations, Solution, solve
from prunesearch.training.states import StateStore, nameless_store

BATCH = 32
HELD_OUT = 8  # every so many utterances are held out, to choose the ridge on


@dataclass(frozen=True)
class FitSet:
    """Utterances of train that a repair is fitted on, in batches of similar length, and those that its ridge is chosen on."""

    fit: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, context: TrainingContext, utterances: int) -> "FitSet":
        """Drawn by the study's seed; one in `HELD_OUT` of them is held out."""
        seconds = [u.seconds for u in context.corpora["train"]]
        drawn = random.Random(f"{context.config.seed} repair").sample(range(len(seconds)), min(utterances, len(seconds)))

        def batches(indices: list[int]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(indices[i] for i in b) for b in by_length([seconds[i] for i in indices], BATCH))

        return cls(batches([i for n, i in enumerate(drawn) if n % HELD_OUT]), batches(drawn[::HELD_OUT]))

    @property
    def indices(self) -> list[int]:
        return sorted(i for batches in (self.fit, self.held_out) for batch in batches for i in batch)


@dataclass
class Stream:
    """The states of all utterances of the fit set at one depth of an encoder."""

    store: StateStore
    device: torch.device
    dtype: torch.dtype

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.store.batch(indices, self.device)


class Repair:
    """Repairs pruned encoders of one study; `attention`: whether `out_proj` is refitted as well as `fc2`."""

    def __init__(self, context: TrainingContext, utterances: int = 400, attention: bool = True, every_layer: bool = True):
        self.context, self.attention, self.every_layer = context, attention, every_layer
        self.set = FitSet.of(context, utterances)
        self.solutions: dict[str, Solution] = {}

    @torch.no_grad()
    def encoder(self, candidate: Candidate) -> WhisperEncoder:
        """The candidate's encoder, repaired. Without removed layers, it is the unpruned encoder itself."""
        context, removed = self.context, set(candidate.removed_layers)
        pruned = remove_layers(context.encoder, removed)
        if not removed:
            return pruned
        depth, lowest_cut = context.depth, min(removed)
        kept = [i for i in range(depth) if i not in removed]
        start = max(lowest_cut - 1, 0)
        full, at = context.prefix("train", self.set.indices), context.shared_depth
        full, at = self._advanced(full, at, start), start
        stream = full
        for place, i in enumerate(kept):
            if i < start:
                continue
            behind = kept[place + 1] if place + 1 < len(kept) else depth
            full, at = self._advanced(full, at, i), i
            target = self._advanced(full, i, behind)
            refit = self.every_layer or behind > i + 1 or i < lowest_cut
            layer = copy.deepcopy(pruned.layers[place]) if refit else pruned.layers[place]
            pruned.layers[place] = layer
            if refit and self.attention and i > lowest_cut:
                original = context.encoder.layers[i]
                self._fit(f"{i}.out_proj", layer.self_attn.out_proj, stream, full, _attention_rows(layer, original))
            if refit:
                self._fit(f"{i}.fc2", layer.fc2, stream, target, _feed_forward_rows(layer))
            stream = self._applied(stream, [layer])
            full, at = target, behind
        return pruned

    def projector(self, projector: Projector, encoder: WhisperEncoder) -> None:
        """Refit the projector's first linear map in place, for the states of a pruned (and repaired) encoder."""
        context = self.context
        prefix = context.prefix("train", self.set.indices)
        full = context.states.finish(prefix, context.encoder, self.set.indices)
        pruned = context.states.finish(prefix, encoder, self.set.indices)
        up = copy.deepcopy(projector.up)

        def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            stacked, audio_lengths = projector.stacked(h, lengths)
            wanted, _ = projector.stacked(x, lengths)
            inside = torch.arange(stacked.shape[1], device=stacked.device) < audio_lengths[:, None]
            return stacked[inside].float(), up(wanted[inside].float())

        self._fit("projector.up", projector.up, pruned, full, rows)

    def _fit(self, name: str, linear: nn.Linear, stream: StateStore, full: StateStore, rows: Callable[..., Any]) -> None:
        """Refit a linear map in place, from the rows that a batch of the pruned and of the unpruned stream gives."""
        context = self.context
        sums = []
        for batches in (self.set.fit, self.set.held_out):
            equations = NormalEquations(linear)
            for h, x, lengths in self._batches(batches, stream, full):
                with arithmetic(context.device, context.dtype):
                    inputs, outputs = rows(h, x, lengths)
                equations.add(inputs, outputs)
                context.progress("repairing", 0, 1)
            sums.append(equations)
        solution = solve(*sums)
        linear.weight.data = solution.weight.to(linear.weight.dtype)
        linear.bias.data = solution.bias.to(linear.bias.dtype)
        self.solutions[name] = solution

    def _batches(
        self, batches: Sequence[Sequence[int]], stream: StateStore, full: StateStore
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in batches:
            h, lengths = stream.batch(batch, self.context.device)
            x, _ = full.batch(batch, self.context.device)
            yield h, x, lengths

    def _advanced(self, store: StateStore, first: int, last: int) -> StateStore:
        """The unpruned stream before layer `last`, from that before layer `first`."""
        return store if first == last else self._applied(store, list(self.context.encoder.layers[first:last]))

    def _applied(self, store: StateStore, layers: Sequence[nn.Module]) -> StateStore:
        context = self.context
        out = nameless_store(context.states.scratch, {i: store.length(i) for i in self.set.indices}, store)
        for batch in (*self.set.fit, *self.set.held_out):
            hidden, lengths = store.batch(batch, context.device)
            mask = padding_mask(lengths, hidden.shape[1])
            with arithmetic(context.device, context.dtype):
                for layer in layers:
                    hidden = layer(hidden, mask)
            out.write(batch, hidden)
        return out


def _attention_rows(layer: Any, original: Any) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs of the layer's `out_proj` on the pruned stream; what it should add: the unpruned stream behind the attention - h."""

    def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = _inside(h, lengths)
        behind_attention = x + _attention(original, x, lengths)[0]
        return _attention(layer, h, lengths)[1][inside], (behind_attention - h)[inside]

    return rows


def _feed_forward_rows(layer: Any) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs of the layer's `fc2` on the pruned stream; what it should add to reach the target x."""

    def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = _inside(h, lengths)
        m = h + _attention(layer, h, lengths)[0]
        return layer.activation_fn(layer.fc1(layer.final_layer_norm(m)))[inside], (x - m)[inside]

    return rows


def _attention(layer: Any, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's attention adds to the stream, and the concatenated heads that `out_proj` reads: (B, T, D) each."""
    heads: list[Tensor] = []
    hook = layer.self_attn.out_proj.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    try:
        mask = padding_mask(lengths, hidden.shape[1])
        added, _ = layer.self_attn(hidden_states=layer.self_attn_layer_norm(hidden), attention_mask=mask)
    finally:
        hook.remove()
    return added, heads[0]


def _inside(states: Tensor, lengths: Tensor) -> Tensor:
    """(B, T): whether a position belongs to its utterance."""
    return torch.arange(states.shape[1], device=states.device) < lengths[:, None]
