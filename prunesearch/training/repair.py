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


Rows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Pruned states, unpruned states (B, T, D), lengths (B,) -> inputs of a map (N, I), wanted outputs (N, O)."""


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
        """The encoder without these layers, repaired from the lowest cut upwards. Layers that are not refitted are shared with
        the unpruned encoder.
        """
        context, removed = self.context, set(removed_layers)
        pruned = remove_layers(context.encoder, removed)
        if not removed:
            return pruned
        kept = [i for i in range(context.depth) if i not in removed]
        lowest = min(removed)
        start = max(lowest - 1, 0)
        at, full = start, self._advanced(context.prefix("train"), context.shared_depth, start)
        stream = full
        for place, i in enumerate(kept):
            if i < start:
                continue
            behind = kept[place + 1] if place + 1 < len(kept) else context.depth
            full = self._advanced(full, at, i)
            target = self._advanced(full, i, behind)
            if self.above or behind > i + 1:
                pruned.layers[place] = layer = copy.deepcopy(pruned.layers[place])
                if self.attention and i > lowest:
                    rows = _attention_rows(layer, context.encoder.layers[i])
                    self._refit(f"{i}.out_proj", layer.self_attn.out_proj, rows, stream, full)
                self._refit(f"{i}.fc2", layer.fc2, _feed_forward_rows(layer), stream, target)
            stream = self._through([pruned.layers[place]], stream)
            at, full = behind, target
        return pruned

    @torch.no_grad()
    def projector(self, projector: Projector, encoder: WhisperEncoder) -> None:
        """Refit the projector's first linear map in place: on the states of `encoder`, it shall compute what it computed on
        those of the unpruned encoder.
        """
        states, prefix = self.context.states, self.context.prefix("train")
        full = states.finish(prefix, self.context.encoder, self._set.indices)
        pruned = states.finish(prefix, encoder, self._set.indices)
        self._refit("projector.up", projector.up, _projector_rows(projector, copy.deepcopy(projector.up)), pruned, full)

    def _refit(self, name: str, linear: nn.Linear, rows: Rows, stream: StateStore, full: StateStore) -> None:
        """Refit a linear map in place."""
        fit, held_out = (self._sums(linear, rows, batches, stream, full) for batches in (self._set.fit, self._set.held_out))
        solution = self.solutions[name] = solve(fit, held_out)
        linear.weight.data = solution.weight.to(linear.weight.dtype)
        linear.bias.data = solution.bias.to(linear.bias.dtype)

    def _sums(
        self, linear: nn.Linear, rows: Rows, batches: Sequence[Sequence[int]], stream: StateStore, full: StateStore
    ) -> NormalEquations:
        context, sums = self.context, NormalEquations(linear)
        for batch in batches:
            h, lengths = stream.batch(batch, context.device)
            x, _ = full.batch(batch, context.device)
            with arithmetic(context.device, context.dtype):
                inputs, outputs = rows(h, x, lengths)
            sums.add(inputs, outputs)
            context.progress("repairing", len(self.solutions), 2 * context.depth)
        return sums

    def _advanced(self, store: StateStore, first: int, last: int) -> StateStore:
        """The unpruned stream before layer `last`, from that before layer `first`."""
        return store if first == last else self._through(list(self.context.encoder.layers[first:last]), store)

    def _through(self, layers: Sequence[nn.Module], store: StateStore) -> StateStore:
        """The states behind some layers."""
        context = self.context
        out = nameless_store(context.states.scratch, {i: store.length(i) for i in self._set.indices}, store)
        for batch in self._set.batches:
            hidden, lengths = store.batch(batch, context.device)
            mask = padding_mask(lengths, hidden.shape[1])
            with arithmetic(context.device, context.dtype):
                for layer in layers:
                    hidden = layer(hidden, mask)
            out.write(batch, hidden)
        return out


def _attention_rows(layer: Any, original: Any) -> Rows:
    """Inputs of the layer's `out_proj` on the pruned stream; it should add the unpruned stream behind the attention less h."""

    def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = _inside(h, lengths)
        behind_attention = x + _attention(original, x, lengths)[0]
        return _attention(layer, h, lengths)[1][inside], (behind_attention - h)[inside]

    return rows


def _feed_forward_rows(layer: Any) -> Rows:
    """Inputs of the layer's `fc2` on the pruned stream; what it should add to reach the target x."""

    def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = _inside(h, lengths)
        m = h + _attention(layer, h, lengths)[0]
        return layer.activation_fn(layer.fc1(layer.final_layer_norm(m)))[inside], (x - m)[inside]

    return rows


def _projector_rows(projector: Projector, before: nn.Linear) -> Rows:
    """Stacked states of the pruned encoder; what the first map (`before`) computes from those of the unpruned one."""

    def rows(h: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        stacked, audio_lengths = projector.stacked(h, lengths)
        inside = _inside(stacked, audio_lengths)
        return stacked[inside].float(), before(projector.stacked(x, lengths)[0][inside].float())

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
