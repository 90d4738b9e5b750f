"""Closed-form repair: what removed layers cost is computed by least squares, without training and without transcripts.

In every encoder layer, two linear maps write into the stream: the attention's `out_proj` and the feed-forward's `fc2`. From the
lowest cut upwards, both are refitted in each kept layer, so that the stream of the pruned encoder becomes again what the
unpruned encoder has at that depth. With X_i the unpruned stream before layer i, M_i the unpruned stream behind layer i's
attention, h the pruned stream so far, and j the next kept layer after i (or the end of the encoder):

    out_proj  <-  ridge regression from the concatenated heads to     M_i - h     (in layers above the lowest cut)
    m = h + attention(h)
    fc2       <-  ridge regression from GELU(fc1(LayerNorm(m))) to    X_j - m
    h = m + fc2(...)

At the end, the projector's first linear map is refitted in the same way to what it computed from the unpruned encoder. No
parameter is added; the result is a plain Whisper encoder. It follows from the layer set, the recordings and the ridge: it can
be made again at any time. Sources: ReplaceMe (arXiv 2505.02819) puts one linear map in place of a run of LLM blocks, by least
squares.

Shapes: B batch, T positions, D width, N valid positions of a batch.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import padding_mask, remove_layers, with_repaired_maps
from prunesearch.model.projector import Projector
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.record import ENCODER_FILE, RepairSummary, RunRecord, record_folder
from prunesearch.training.anchor import starting_projector
from prunesearch.training.batches import by_length
from prunesearch.training.context import TrainingContext, write_tensors
from prunesearch.training.device import arithmetic
from prunesearch.training.ridge import NormalEquations, Solution, solve
from prunesearch.training.states import StateStore, nameless_store

Batches = Sequence[Sequence[int]]

BATCH = 32
HELD_OUT = 8  # one in so many utterances is held out, to choose the ridge on


@dataclass(frozen=True)
class FitSet:
    """Utterances of train that a repair is fitted on, in batches of similar length, and those that its ridge is chosen on."""

    fit: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, context: TrainingContext) -> "FitSet":
        """The utterances that the study draws for repairs; one in `HELD_OUT` of them is held out."""
        seconds, drawn = [u.seconds for u in context.corpora["train"]], context.repair_utterances

        def batches(indices: list[int]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(indices[i] for i in b) for b in by_length([seconds[i] for i in indices], BATCH))

        return cls(batches([i for n, i in enumerate(drawn) if n % HELD_OUT]), batches(drawn[::HELD_OUT]))

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        return self.fit + self.held_out

    @property
    def indices(self) -> list[int]:
        return sorted(i for batch in self.batches for i in batch)


Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs of a map (B, T, I), what it should put out (B, T, O), and lengths (B,)."""


@dataclass
class Repair:
    """Repairs one candidate's encoder and projector. `solutions`: what was found, by the name of the map.

    `attention`: whether `out_proj` is refitted as well as `fc2`; `above`: whether layers that do not border on a cut are, too.
    """

    context: TrainingContext
    attention: bool = True
    above: bool = True
    solutions: dict[str, Solution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._set = FitSet.of(self.context)

    @torch.no_grad()
    def encoder(self, removed_layers: Sequence[int]) -> WhisperEncoder:
        """The encoder without these layers, repaired from the lowest cut upwards.

        Layers that are not refitted are shared with the unpruned encoder.
        """
        context, removed = self.context, set(removed_layers)
        pruned, layers = remove_layers(context.encoder, removed), context.encoder.layers
        if not removed:
            return pruned
        lowest, kept = min(removed), [i for i in range(context.depth) if i not in removed]
        at = max(lowest - 1, 0)
        stream = full = self._behind(layers[context.shared_depth : at], context.prefix("train"))  # full: before layer `at`
        for place, (i, following) in enumerate(zip(kept, [*kept[1:], context.depth], strict=True)):
            if i < at:
                continue
            full = self._behind(layers[at:i], full)
            middle = self._map(partial(_behind_attention, layers[i]), full)  # M_i
            full = self._behind(layers[i + 1 : following], self._map(partial(_behind_feed_forward, layers[i]), middle))  # X_j
            at = following
            if not (self.above or following > i + 1):
                stream = self._behind([layers[i]], stream)
                continue
            pruned.layers[place] = layer = copy.deepcopy(layers[i])
            heads = self._map(partial(_heads, layer), stream)
            if self.attention and i > lowest:
                self._refit(f"{i}.out_proj", layer.self_attn.out_proj, _attention_rows, heads, middle, stream)
            m = self._map(partial(_add_attention, layer), stream, heads)
            self._refit(f"{i}.fc2", layer.fc2, partial(_feed_forward_rows, layer), m, full)
            stream = self._map(partial(_behind_feed_forward, layer), m)
        return pruned

    @torch.no_grad()
    def projector(self, projector: Projector, encoder: WhisperEncoder) -> None:
        """Refit the projector's first linear map in place.

        On the states of `encoder`, it shall compute what it computed on those of the unpruned encoder.
        """
        states, prefix = self.context.states, self.context.prefix("train")
        full = states.finish(prefix, self.context.encoder, self._set.indices)
        pruned = states.finish(prefix, encoder, self._set.indices)
        rows = partial(_projector_rows, projector, copy.deepcopy(projector.up))
        self._refit("projector.up", projector.up, rows, pruned, full)

    def _refit(self, name: str, linear: nn.Linear, rows: Callable[..., Rows], *streams: StateStore) -> None:
        """Refit a linear map in place. `rows`: of the streams' states of a batch, and their lengths."""
        fit, held_out = (self._sums(linear, rows, batches, streams) for batches in (self._set.fit, self._set.held_out))
        solution = self.solutions[name] = solve(fit, held_out)
        linear.weight.data = solution.weight.to(linear.weight.dtype)
        linear.bias.data = solution.bias.to(linear.bias.dtype)

    def _sums(
        self, linear: nn.Linear, rows: Callable[..., Rows], batches: Batches, streams: Sequence[StateStore]
    ) -> NormalEquations:
        sums = NormalEquations(linear)
        for batch in batches:
            with arithmetic(self.context.device, self.context.dtype):
                inputs, outputs, lengths = rows(*self._read(batch, streams))
            inside = torch.arange(inputs.shape[1], device=lengths.device) < lengths[:, None]
            sums.add(inputs[inside], outputs[inside])
            self.context.progress("repairing", len(self.solutions), 2 * self.context.depth)
        return sums

    def _map(self, function: Callable[..., Tensor], *streams: StateStore) -> StateStore:
        """A new stream: the function of the streams' states of a batch, and their lengths."""
        out = nameless_store(self.context.states.scratch, {i: streams[0].length(i) for i in self._set.indices}, streams[0])
        for batch in self._set.batches:
            with arithmetic(self.context.device, self.context.dtype):
                out.write(batch, function(*self._read(batch, streams)))
        return out

    def _behind(self, layers: Sequence[nn.Module], stream: StateStore) -> StateStore:
        """The stream behind some layers."""
        return self._map(partial(_behind_layers, layers), stream) if len(layers) else stream

    def _read(self, batch: Sequence[int], streams: Sequence[StateStore]) -> list[Tensor]:
        """The streams' states (B, T, D), and the lengths (B,)."""
        read = [stream.batch(batch, self.context.device) for stream in streams]
        return [*(states for states, _ in read), read[0][1]]


# The parts of a Whisper layer, as its own `forward` runs them. Dropout is off: encoders are frozen.


def _behind_layers(layers: Sequence[nn.Module], hidden: Tensor, lengths: Tensor) -> Tensor:
    mask = padding_mask(lengths, hidden.shape[1])
    for layer in layers:
        hidden = layer(hidden, mask)
    return hidden


def _heads(layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
    """The concatenated heads, which `out_proj` reads."""
    heads: list[Tensor] = []
    hook = layer.self_attn.out_proj.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    try:
        normed = layer.self_attn_layer_norm(hidden)
        layer.self_attn(hidden_states=normed, attention_mask=padding_mask(lengths, hidden.shape[1]))
    finally:
        hook.remove()
    return heads[0]


def _add_attention(layer: Any, hidden: Tensor, heads: Tensor, lengths: Tensor) -> Tensor:
    added: Tensor = layer.self_attn.out_proj(heads)
    return hidden + added


def _behind_attention(layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
    return _add_attention(layer, hidden, _heads(layer, hidden, lengths), lengths)


def _activations(layer: Any, middle: Tensor) -> Tensor:
    """The inputs of `fc2`."""
    activations: Tensor = layer.activation_fn(layer.fc1(layer.final_layer_norm(middle)))
    return activations


def _behind_feed_forward(layer: Any, middle: Tensor, lengths: Tensor) -> Tensor:
    added: Tensor = layer.fc2(_activations(layer, middle))
    return middle + added


# The rows that maps are refitted on


def _attention_rows(heads: Tensor, middle: Tensor, hidden: Tensor, lengths: Tensor) -> Rows:
    """`out_proj` should add to the pruned stream what leads to the unpruned stream behind the attention."""
    return heads, middle.float() - hidden.float(), lengths


def _feed_forward_rows(layer: Any, middle: Tensor, target: Tensor, lengths: Tensor) -> Rows:
    """`fc2` should add to the pruned stream what leads to the unpruned stream before the next kept layer."""
    return _activations(layer, middle), target.float() - middle.float(), lengths


def _projector_rows(projector: Projector, before: nn.Linear, pruned: Tensor, full: Tensor, lengths: Tensor) -> Rows:
    """The first map should compute from the pruned encoder's states what it computed (`before`) from the unpruned one's."""
    stacked, audio_lengths = projector.stacked(pruned, lengths)
    with torch.autocast(stacked.device.type, enabled=False):
        wanted = before(projector.stacked(full, lengths)[0].float())
    return stacked, wanted, audio_lengths


def start_of(context: TrainingContext, candidate: Candidate) -> tuple[WhisperEncoder, Projector, RepairSummary | None]:
    """What a candidate's training starts from: its pruned encoder and its projector, repaired as the study says."""
    method, removed = context.config.training.repair, candidate.removed_layers
    projector = starting_projector(context, candidate.repeat)
    if method == "none" or not removed:
        return context.pruned_encoder(candidate), projector, None
    repair = Repair(context)
    encoder = repair.encoder(removed) if method == "layers" else context.pruned_encoder(candidate)
    repair.projector(projector, encoder)
    found = repair.solutions.items()
    summary = RepairSummary(
        method=method,
        utterances=len(context.repair_utterances),
        ridge={name: s.ridge for name, s in found},
        unexplained={name: round(s.unexplained, 6) for name, s in found},
    )
    return encoder, projector, summary


def repaired_encoder(context: TrainingContext, candidate: Candidate) -> WhisperEncoder:
    """The candidate's encoder, with its repair from the record's folder if it was kept there, else made again."""
    if context.config.training.repair != "layers" or not candidate.removed_layers:
        return context.pruned_encoder(candidate)
    file = record_folder(context.records, candidate) / ENCODER_FILE
    if file.exists():
        return with_repaired_maps(context.pruned_encoder(candidate), load_file(file))
    return Repair(context).encoder(candidate.removed_layers)


def keep_repaired_maps(context: TrainingContext, candidate: Candidate, encoder: WhisperEncoder) -> None:
    """Write the maps of a repaired encoder that differ from the unpruned encoder's, beside the candidate's record."""
    plain = context.pruned_encoder(candidate).state_dict()
    maps = {name: t for name, t in encoder.state_dict().items() if t.data_ptr() != plain[name].data_ptr()}
    if maps:
        write_tensors(record_folder(context.records, candidate) / ENCODER_FILE, maps)


def keep_maps_of(config: StudyConfig, records: Iterable[RunRecord]) -> None:
    """See to it that the repaired maps of these records are kept beside them; missing ones are made again.

    Only the baselines and the front keep theirs from the start. Raises StudyError where the study's recordings cannot be read.
    """
    missing = [
        r.candidate
        for r in records
        if r.repair is not None
        and r.repair.method == "layers"
        and not (record_folder(config.run_folder / "records", r.candidate) / ENCODER_FILE).exists()
    ]
    if missing:
        context = TrainingContext.open(config)
        for candidate in missing:
            keep_repaired_maps(context, candidate, repaired_encoder(context, candidate))
