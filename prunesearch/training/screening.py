"""Screening: the loss of many layer sets after the closed-form repair, without any training.

The repair goes from the bottom up, so sets that have their lower layers in common share the repair of these: sets form a tree,
which is walked depth first. A set costs the layers above the last branch, the projector's map, and one pass of the LLM over
some dev utterances.
"""

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from prunesearch.model.system import SpeechProjector
from prunesearch.study.candidate import count_candidates
from prunesearch.study.files import read_unless_damaged, write_atomically
from prunesearch.study.importance import LayerSet, Scan, SetScore
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic
from prunesearch.training.refit import Refit
from prunesearch.training.streams import Group, Stream, batches_of

SCORED = 256  # dev utterances: with 64, the order of sets is half noise
FITTED = 256  # utterances that a screened repair is fitted on: with 128, the order of larger sets is noisier


class Screened(BaseModel):
    """What a set's repair leaves. `loss`: on dev, nats per token. `residual`: squared error of what the projector's first map
    computes for recordings that nothing was fitted to, per row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: float
    residual: float


Known = dict[LayerSet, Screened]


class Screen:
    """Screens layer sets with the anchor's system.

    `projector`: the anchor's. `utterances`: of dev, for the loss. `fitted`: utterances that repairs are fitted on; one in eight
    of them is held out.
    """

    def __init__(self, context: TrainingContext, projector: SpeechProjector, utterances: int = SCORED, fitted: int = FITTED):
        self.context = context
        self._refit_layers = context.config.training.repair == "layers"
        dev = context.corpora["dev"]
        chosen = sorted(random.Random(context.config.seed).sample(range(len(dev)), min(utterances, len(dev))))
        self._dev = batches_of([u.seconds for u in dev], chosen)
        self._targets = {i: context.target(dev[i]) for i in chosen}
        others = (Group(context.prefix("dev"), self._dev),)
        self._streams = context.streams_over(context.repair_utterances[:fitted], others)
        self._refit = Refit(self._streams, context.dtype)
        self._projector = projector

    @torch.no_grad()
    def measure(self, sets: Sequence[LayerSet]) -> Iterator[tuple[LayerSet, Screened]]:
        """Each set, sorted, and what its repair leaves, in the order of the tree."""
        by_start: dict[int, list[LayerSet]] = {}
        for layers in sorted(sets):
            by_start.setdefault(_next_kept(layers, self._streams.first), []).append(layers)
        for start, members in by_start.items():
            cut = tuple(range(self._streams.first, start))  # the first layers are gone: nothing stands below to be refitted
            yield from self._visit(start, self._streams.before(self._streams.first), cut, members)

    def _visit(self, at: int, stream: Stream, cut: LayerSet, sets: Sequence[LayerSet]) -> Iterator[tuple[LayerSet, Screened]]:
        """All sets that have lost exactly `cut` of the layers below `at`, and keep layer `at`. `stream`: before that layer."""
        if at == self.context.depth:
            yield sets[0], self._left(sets[0], stream)
            return
        by_following: dict[int, list[LayerSet]] = {}
        for layers in sets:
            by_following.setdefault(_next_kept(layers, at + 1), []).append(layers)
        layer, middle = copy.deepcopy(self.context.encoder.layers[at]), None
        original = copy.deepcopy(self.context.encoder.feed_forward_map(layer).state_dict())
        for following, members in by_following.items():
            lost = (*cut, *range(at + 1, following))
            if not lost:
                yield from self._visit(following, self._streams.before(following), lost, members)
                continue
            if middle is None:
                middle = self._behind_attention(at, layer, stream, bool(cut))
            self.context.encoder.feed_forward_map(layer).load_state_dict(original)
            if self._refit_layers:
                self._refit.feed_forward(layer, middle, following)
            yield from self._visit(following, self._refit.behind_feed_forward(layer, middle), lost, members)

    def _behind_attention(self, at: int, layer: nn.Module, stream: Stream, above_a_cut: bool) -> Stream:
        heads = self._refit.heads(layer, stream)
        if above_a_cut and self._refit_layers:
            self._refit.attention(at, layer, heads, stream)
        return self._refit.behind_attention(layer, heads, stream)

    def _left(self, layers: LayerSet, behind: Stream) -> Screened:
        context, projector, residual = self.context, copy.deepcopy(self._projector), 0.0
        if layers:
            residual = self._refit.projector(projector, behind).error
        loss, tokens = 0.0, 0
        with context.system.reader(projector) as reader:
            for batch in self._dev:
                hidden, lengths = self._streams.read(batch, [behind[1]])
                targets = [self._targets[i] for i in batch]
                with arithmetic(context.device, context.dtype):
                    loss += float(reader.loss_sum(context.encoder.output(hidden, lengths), lengths, targets))
                tokens += sum(len(target.tokens) for target in targets)
        return Screened(loss=loss / tokens, residual=residual)


class ScreeningChoice(Protocol):
    """Chooses the sets that are screened next, or none."""

    def __call__(
        self, known: Mapping[LayerSet, float], removable: Sequence[int], largest: int, most: int
    ) -> Sequence[LayerSet]:
        """`known`: what each screened set adds to the loss; `()` has the unpruned loss. At most `most` sets of up to `largest`
        layers shall be known in the end."""


class Screening(BaseModel):
    """Sets screened so far, and those of the present round; kept on disk, so that a killed scan can be continued."""

    seconds: float = 0.0
    sets: dict[str, Screened] = {}
    round: list[LayerSet] = []
    _path: Path

    @classmethod
    def continued(cls, path: Path) -> Self:
        """What an earlier scan has left in the file."""
        screening = read_unless_damaged(path, cls) or cls()
        screening._path = path
        return screening

    def run(self, context: TrainingContext, projector: SpeechProjector, scan: Scan, choose: ScreeningChoice, most: int) -> Scan:
        """The scan with losses after the repair, of its own sets and of larger ones."""
        begin, removable = time.perf_counter() - self.seconds, context.config.removable(context.depth)
        screen, largest = Screen(context, projector), context.config.max_removed(context.depth)
        count = min(most + 1, count_candidates(len(removable), largest, 1))
        while True:
            self.round = self.round or list(choose(self.increases, removable, largest, most))
            for layers, found in screen.measure([s for s in self.round if set_key(s) not in self.sets]):
                self.sets[set_key(layers)] = found
                self.seconds = time.perf_counter() - begin
                write_atomically(self._path, self.model_dump_json())
                context.progress("screening layer sets", len(self.sets), count)
            if not self.round:
                return self._added_to(scan)
            self.round = []

    @property
    def known(self) -> Known:
        return {tuple(map(int, key.split(","))) if key else (): found for key, found in self.sets.items()}

    @property
    def increases(self) -> dict[LayerSet, float]:
        """What each set adds to the loss; `()` has the unpruned loss."""
        known = self.known
        return {s: found.loss - (known[()].loss if s else 0.0) for s, found in known.items()}

    def _added_to(self, scan: Scan) -> Scan:
        increases, scores = self.increases, {score.removed_layers: score for score in scan.sets}
        unpruned = increases.pop(())
        for layers, loss in increases.items():
            score = scores.get(layers, SetScore(removed_layers=layers))
            residual = self.sets[set_key(layers)].residual
            scores[layers] = score.model_copy(update={"repaired_loss": loss, "residual": residual})
        ordered = sorted(scores.values(), key=lambda score: (len(score.removed_layers), score.removed_layers))
        update = {"sets": tuple(ordered), "screening_seconds": self.seconds, "screening_unpruned_loss": unpruned}
        return scan.model_copy(update=update)


def set_key(layers: LayerSet) -> str:
    return ",".join(map(str, layers))


def _next_kept(layers: LayerSet, at: int) -> int:
    """The first layer from `at` on that is not removed."""
    while at in layers:
        at += 1
    return at
