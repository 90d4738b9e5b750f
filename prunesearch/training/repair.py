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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from prunesearch.model.system import SpeechEncoder, SpeechProjector
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.progress import print_note
from prunesearch.study.record import ENCODER_FILE, RepairSummary, RunRecord, record_folder
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.refit import Refit
from prunesearch.training.ridge import LADDER, Solution
from prunesearch.training.streams import Stream
from prunesearch.training.tensors import is_whole, read_tensors, write_tensors


@dataclass
class Repair:
    """Repairs the system that is left when some layers are removed.

    `attention`: whether `out_proj` is refitted as well as `fc2`. `above`: whether layers that do not border on a cut are, too.
    `ladder`: ridges that are tried. `encoder`: the pruned encoder; layers that are not refitted are shared with the unpruned
    one. `solutions`: what was found, by the name of the map.
    """

    context: TrainingContext
    removed_layers: Sequence[int]
    attention: bool = True
    above: bool = True
    ladder: Sequence[float] = LADDER
    encoder: SpeechEncoder = field(init=False)
    solutions: dict[str, Solution] = field(default_factory=dict)
    _behind: Stream | None = None  # the stream behind the pruned encoder's last layer

    def __post_init__(self) -> None:
        self.encoder = self.context.encoder.without(self.removed_layers)
        self._removed = set(self.removed_layers)
        self._kept = [i for i in range(self.context.depth) if i not in self._removed]
        # the lowest layer whose output changes: the one below the lowest cut is refitted
        self._lowest = max(min(self._removed, default=self.context.depth) - 1, 0)
        self._refit = Refit(self.context.streams, self.context.dtype, self.ladder)

    @torch.no_grad()
    def layers(self) -> None:
        """Refit the encoder's layers, from the lowest cut upwards."""
        refit, depth = self._refit, self.context.depth
        stream = refit.streams.before(self._lowest)
        for place, (i, following) in enumerate(zip(self._kept, [*self._kept[1:], depth], strict=True)):
            if i < self._lowest:
                continue
            self.context.progress("repairing", i, depth)
            layer = self.encoder.layers[place]
            if not (self.above or following > i + 1):
                stream = refit.behind_layer(layer, stream)
                continue
            layer = self.encoder.layers[place] = copy.deepcopy(layer)
            heads = refit.heads(layer, stream)
            if self.attention and i > min(self._removed):
                self.solutions[f"{i}.out_proj"] = refit.attention(i, layer, heads, stream)
            middle = refit.behind_attention(layer, heads, stream)
            self.solutions[f"{i}.fc2"] = refit.feed_forward(layer, middle, following)
            stream = refit.behind_feed_forward(layer, middle)
        self._behind = stream

    @torch.no_grad()
    def projector(self, projector: SpeechProjector) -> None:
        """Refit the projector's first linear map in place.

        On the states of the pruned encoder, it shall compute what it computed on those of the unpruned one.
        """
        if self._behind is None:
            cut = min(self._removed)  # below it, both encoders have the same layers
            streams = self.context.streams
            self._behind = streams.map(partial(self.encoder.run, first=cut), streams.before(cut))
        self.solutions[f"projector.{projector.entry_name}"] = self._refit.projector(projector, self._behind)


def start_of(context: TrainingContext, candidate: Candidate) -> tuple[SpeechEncoder, SpeechProjector, RepairSummary | None]:
    """What a candidate's training starts from: its pruned encoder and its projector, repaired as the study says."""
    method, removed = context.config.training.repair, candidate.removed_layers
    projector = starting_projector(context, candidate.repeat)
    if method == "none" or not removed:
        return context.pruned_encoder(candidate), projector, None
    repair = Repair(context, removed)
    if method == "layers":
        repair.layers()
    if context.config.training.init == "anchor":
        repair.projector(projector)
    found = repair.solutions.items()
    summary = RepairSummary(
        method=method,
        utterances=len(context.repair_utterances),
        ridge={name: s.ridge for name, s in found},
        unexplained={name: round(s.unexplained, 6) for name, s in found},
    )
    return repair.encoder, projector, summary


def repaired_encoder(context: TrainingContext, candidate: Candidate) -> SpeechEncoder:
    """The candidate's encoder, with its repair from the record's folder if it was kept there, else made again."""
    if context.config.training.repair != "layers" or not candidate.removed_layers:
        return context.pruned_encoder(candidate)
    file, encoder = record_folder(context.records, candidate) / ENCODER_FILE, context.pruned_encoder(candidate)
    if file.exists():
        try:
            return encoder.with_maps(read_tensors(file, encoder.module.state_dict(), "it is made again", complete=False))
        except StudyError as error:
            print_note(str(error))
    repair = Repair(context, candidate.removed_layers)
    repair.layers()
    return repair.encoder


def keep_repaired_maps(context: TrainingContext, candidate: Candidate, encoder: SpeechEncoder) -> None:
    """Write the maps of a repaired encoder that differ from the unpruned encoder's, beside the candidate's record."""
    plain = context.pruned_encoder(candidate).module.state_dict()
    maps = {name: t for name, t in encoder.module.state_dict().items() if t.data_ptr() != plain[name].data_ptr()}
    if maps:
        write_tensors(record_folder(context.records, candidate) / ENCODER_FILE, maps)


def keep_maps_of(config: StudyConfig, records: Iterable[RunRecord]) -> None:
    """See to it that the repaired maps of these records are kept beside them; missing and damaged ones are made again.

    Only the baselines and the front keep theirs, from the final test on. Raises StudyError where the study's recordings cannot
    be read.
    """
    missing = [
        r.candidate
        for r in records
        if r.repair is not None
        and r.repair.method == "layers"
        and not is_whole(record_folder(config.run_folder / "records", r.candidate) / ENCODER_FILE)
    ]
    if missing:
        context = TrainingContext.open(config)
        for candidate in missing:
            keep_repaired_maps(context, candidate, repaired_encoder(context, candidate))
