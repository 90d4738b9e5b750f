"""The importance scan: how much worse the anchor's system gets when layers are removed and nothing is trained.

Layer sets form a tree. States that several sets have in common are computed once, and all sets that are alive at a layer go
through it as one batch. Shapes: B batch, T positions, D width, A audio embeddings.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from prunesearch.model.system import SpeechProjector
from prunesearch.speech.audio import version_of
from prunesearch.study.candidate import Candidate
from prunesearch.study.files import read_unless_damaged, write_atomically
from prunesearch.study.importance import (
    Evaluations,
    LayerScore,
    LayerSet,
    Scan,
    SetScore,
    evaluations,
    family,
    prefixes,
    write_scan,
)
from prunesearch.study.interrupt import locked
from prunesearch.study.record import SplitResult
from prunesearch.training.anchor import anchor_digest, anchor_projector
from prunesearch.training.batches import by_length
from prunesearch.training.context import TrainingContext
from prunesearch.training.device import arithmetic
from prunesearch.training.screening import Screening, ScreeningChoice, set_key

ROWS = 128  # sequences that go through a layer at once
BATCH = 16  # utterances, if the end states of all sets fit into END_STATES bytes
END_STATES = 2 * 2**30
CKA_POSITIONS = 2048  # positions of a batch that are compared, at most: the Gram matrices have this size squared


class _Sums(BaseModel):
    """Sums over batches, by set or by layer; kept on disk, so that a killed scan can be continued."""

    batches: int = 0
    seconds: float = 0.0
    drift: dict[str, float] = {}  # squared error of the projector's output
    reference: float = 0.0
    loss: dict[str, float] = {}
    tokens: int = 0
    positions: int = 0
    cosine: dict[str, float] = {}  # "first-block length"
    change: dict[str, float] = {}
    size: dict[str, float] = {}
    hsic: dict[str, float] = {}  # "layer-other"

    def add(self, name: str, key: Any, value: float) -> None:
        table = getattr(self, name)
        table[str(key)] = table.get(str(key), 0.0) + value


@dataclass(frozen=True)
class ScanSettings:
    """`most`: largest number of layers in a set.

    `utterances`: number of dev utterances. `loss_sets`: number of larger sets whose loss is measured (those with the least
    projector drift). `with_wer`: also decode without each single layer. `check`: also run each set on its own, compare, and
    time both ways. `screened`: number of sets of up to `search.max_removed` layers whose loss after the repair is measured, at
    most; by default `screened_by_default`; none in a study that repairs nothing.
    """

    most: int = 2
    utterances: int = 64
    loss_sets: int = 128
    with_wer: bool = False
    check: bool = False
    screened: int | None = None


def screened_by_default(layers: int) -> int:
    """Number of sets to screen of an encoder with so many removable layers: eight for each of up to ten, and more for each of
    more, since the sets of a deep encoder are many."""
    return max(8 * layers, round(0.8 * layers**2))


def importance_scan(
    context: TrainingContext, settings: ScanSettings | None = None, choose: ScreeningChoice | None = None
) -> Scan:
    """Score every set of at most `most` removable layers, continuing where a killed scan stopped.

    `choose`: which sets are screened; without it, none is. A finished scan is not repeated. The result is in `scan/scan.json`
    in the study's run folder.
    """
    folder = context.config.run_folder / "scan"
    folder.mkdir(parents=True, exist_ok=True)
    projector = anchor_projector(context)
    with locked(folder / "lock", context.group.check_anywhere):  # the study's other workers wait, and find it finished
        return _scan(context, folder, projector, _counted(context, settings or ScanSettings(), choose), choose)


def _counted(context: TrainingContext, settings: ScanSettings, choose: ScreeningChoice | None) -> ScanSettings:
    """The settings with the number of sets that are screened."""
    screened = settings.screened
    if choose is None or context.config.training.repair == "none":
        screened = 0
    elif screened is None:
        screened = screened_by_default(len(context.config.removable(context.depth)))
    return replace(settings, screened=screened)


def _scan(
    context: TrainingContext, folder: Path, projector: SpeechProjector, settings: ScanSettings, choose: ScreeningChoice | None
) -> Scan:
    anchor = anchor_digest(context)[:12]
    removable = context.config.removable(context.depth)
    name = _scan_name(context, anchor, settings)
    if finished := read_unless_damaged(folder / f"{name}.json", Scan):
        write_scan(folder / "scan.json", finished)
        return finished
    sets = family(removable, settings.most)
    scanner = Scanner(context, projector, settings.utterances, len(sets))

    small = [s for s in sets if len(s) < 2]
    all_losses = len(sets) - len(small) <= settings.loss_sets
    sums = scanner.run(folder / f"{name}.first", sets, set(sets if all_losses else small))
    if not all_losses:  # the LLM is slow: only the most promising sets go through it
        best = sorted((s for s in sets if len(s) > 1), key=lambda s: sums.drift[set_key(s)])[: settings.loss_sets]
        sums.loss |= scanner.run(folder / f"{name}.second", [(), *best], set(best), statistics=False).loss
    counted = evaluations(sets, scanner.first, context.depth)
    wer = scanner.wer(small) if settings.with_wer else {}
    if settings.check:
        counted = counted.model_copy(update=scanner.compare(sets))
    result = scanner.result(sums, sets, wer, counted, anchor)
    if settings.screened and choose is not None:
        screening = Screening.continued(folder / f"{name}.screened")
        result = screening.run(context, projector, result, choose, settings.screened)
    write_scan(folder / f"{name}.json", result)
    write_scan(folder / "scan.json", result)
    for part in ("first", "second", "screened"):
        (folder / f"{name}.{part}").unlink(missing_ok=True)
    return result


def _scan_name(context: TrainingContext, anchor: str, settings: ScanSettings) -> str:
    """A name for everything that a scan's result depends on."""
    dev = [(u.id, u.target, version_of(u.audio)) for u in context.corpora["dev"]]
    removable = context.config.removable(context.depth)
    everything = [context.config.fingerprint(), context.model_digests, anchor, dev, removable, asdict(settings)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]


class Scanner:
    """A subset of dev, and the anchor's system."""

    def __init__(self, context: TrainingContext, projector: SpeechProjector, utterances: int, sets: int):
        self.context = context
        self.first = context.shared_depth
        self.prefix = context.prefix("dev")
        corpus = context.corpora["dev"]
        chosen = sorted(random.Random(context.config.seed).sample(range(len(corpus)), min(utterances, len(corpus))))
        self.chosen = chosen
        longest = max(self.prefix.spans[i][1] for i in chosen)
        one = sets * longest * self.prefix.values.shape[1] * self.prefix.values.element_size()
        batch = max(1, min(BATCH, END_STATES // one))
        self.batches = [[chosen[j] for j in b] for b in by_length([self.prefix.length(i) for i in chosen], batch)]
        self.targets = {i: context.target(corpus[i]) for i in chosen}
        self.projector = projector.eval()

    def layer(self, states: Sequence[Tensor], lengths: Tensor, layer: int) -> list[Tensor]:
        """One layer applied to the states of several sets (each (B, T, D)), in few batches."""
        batch = states[0].shape[0]
        step, out = max(1, ROWS // batch), []
        for begin in range(0, len(states), step):
            part = torch.cat(list(states[begin : begin + step]))
            ran = self.context.encoder.run(part, lengths.repeat(len(part) // batch), layer, layer + 1)
            out.extend(ran.split(batch))
        return out

    def tree(self, hidden: Tensor, lengths: Tensor, sets: Sequence[LayerSet]) -> Iterator[tuple[LayerSet, Tensor, bool]]:
        """Yields the unpruned states before each layer and after the last one (with False), then each set's final states
        (True).

        A node of the tree is dropped once no set continues from it.
        """
        until = prefixes(sets)
        alive: dict[LayerSet, Tensor] = {(): hidden}
        depth = self.context.depth
        for layer in range(self.first, depth):
            yield (), alive[()], False
            branches = {(*node, layer): states for node, states in alive.items() if (*node, layer) in until}
            staying = [node for node in alive if until[node] == -1 or until[node] > layer]
            ran = self.layer([alive[node] for node in staying], lengths, layer)
            alive = dict(zip(staying, ran, strict=True)) | branches
        yield (), alive[()], False
        for node, states in alive.items():
            yield node, states, True

    def projected(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, D) and the projector's output (B, A, D), zero beyond an utterance's end."""
        states = self.context.encoder.output(hidden, lengths)
        audio, audio_lengths = self.projector(states, lengths)
        inside = torch.arange(audio.shape[1], device=audio.device) < audio_lengths[:, None]
        return states, audio.float() * inside[..., None]

    @torch.inference_mode()
    def run(self, path: Path, sets: Sequence[LayerSet], with_loss: set[LayerSet], statistics: bool = True) -> _Sums:
        """All batches that an earlier run, whose sums are in the file, has not done yet."""
        context = self.context
        sums = read_unless_damaged(path, _Sums) or _Sums()
        for done, indices in list(enumerate(self.batches))[sums.batches :]:
            begin = time.perf_counter()
            self._batch(indices, sets, with_loss, statistics, sums)
            sums.batches = done + 1
            sums.seconds += time.perf_counter() - begin
            write_atomically(path, sums.model_dump_json())
            context.progress("scanning", done + 1, len(self.batches))
        return sums

    def _batch(
        self, indices: list[int], sets: Sequence[LayerSet], with_loss: set[LayerSet], statistics: bool, sums: _Sums
    ) -> None:
        hidden, lengths = self.prefix.batch(indices, self.context.device)
        targets = [self.targets[i] for i in indices]
        path: list[Tensor] = []
        whole = None
        with arithmetic(self.context.device, self.context.dtype), self.context.system.reader(self.projector) as reader:
            for node, states, is_end in self.tree(hidden, lengths, sets):
                if not is_end:
                    path.append(states)
                    continue
                encoded, audio = self.projected(states, lengths)
                whole = audio if whole is None else whole  # the empty set comes first
                sums.add("drift", set_key(node), (audio - whole).square().sum().item())
                if node in with_loss:
                    sums.add("loss", set_key(node), reader.loss_sum(encoded, lengths, targets).item())
        assert whole is not None
        sums.reference += whole.square().sum().item()
        sums.tokens += sum(len(target.tokens) for target in targets)
        if statistics:
            self._statistics(path, lengths, sums)

    def _statistics(self, path: Sequence[Tensor], lengths: Tensor, sums: _Sums) -> None:
        """Statistics of what the layers of the unpruned encoder do to their input."""
        inside = torch.arange(path[0].shape[1], device=lengths.device) < lengths[:, None]
        flat = [states[inside].float() for states in path]  # (positions, D) before the first layer, between, and behind
        sums.positions += len(flat[0])
        for begin, end in ((b, e) for b in range(len(flat)) for e in range(b + 1, len(flat))):
            cosines = torch.nn.functional.cosine_similarity(flat[begin], flat[end]).clamp(-1, 1)
            sums.add("cosine", f"{begin}-{end - begin}", cosines.acos().div(torch.pi).sum().item())
            if end == begin + 1:
                sums.add("cosine", begin, cosines.sum().item())
                sums.add("change", begin, (flat[end] - flat[begin]).square().sum().item())
        every = -(-len(flat[0]) // CKA_POSITIONS)
        before = None
        for i, states in enumerate(flat):
            sums.add("size", i, states.square().sum().item())
            gram = gram_matrix(states[::every])
            sums.add("hsic", f"{i}-{i}", unbiased_hsic(gram, gram))
            if before is not None:
                sums.add("hsic", f"{i - 1}-{i}", unbiased_hsic(before, gram))
            before = gram

    def wer(self, sets: Sequence[LayerSet]) -> dict[LayerSet, float]:
        """Dev WER without the sets' layers, on the subset."""
        context, found = self.context, {}
        for done, layers in enumerate(sets):
            states = context.encoded(context.pruned_encoder(Candidate(layers)), "dev", self.chosen)
            with context.system.reader(self.projector) as reader:
                results = context.decode(reader, "dev", states, self.chosen)
            found[layers] = SplitResult.of(results).errors.wer
            context.progress("decoding without a layer", done + 1, len(sets))
        return found

    @torch.inference_mode()
    def compare(self, sets: Sequence[LayerSet]) -> dict[str, float]:
        """Seconds of the encoder for all sets as a tree and set by set, alternately, batch by batch.

        Raises AssertionError when the results differ.
        """
        context, seconds = self.context, {"tree_seconds": 0.0, "one_by_one_seconds": 0.0}

        encoders = {s: context.pruned_encoder(Candidate(s)) for s in sets}

        def one_by_one(hidden: Tensor, lengths: Tensor) -> dict[LayerSet, Tensor]:
            return {s: encoder.run(hidden, lengths, self.first) for s, encoder in encoders.items()}

        def as_tree(hidden: Tensor, lengths: Tensor) -> dict[LayerSet, Tensor]:
            return {node: states for node, states, is_end in self.tree(hidden, lengths, sets) if is_end}

        for done, indices in enumerate(self.batches):
            hidden, lengths = self.prefix.batch(indices, context.device)
            with arithmetic(context.device, context.dtype):
                found = [
                    self._timed(f, k, seconds, hidden, lengths) for f, k in zip((as_tree, one_by_one), seconds, strict=True)
                ]
            for layers, states in found[0].items():
                difference = (states - found[1][layers]).norm() / states.norm()
                assert difference < (1e-4 if context.dtype == torch.float32 else 5e-2), (layers, difference)
            context.progress("comparing with one set at a time", done + 1, len(self.batches))
        return seconds

    def _timed(self, run: Callable[..., Any], name: str, seconds: dict[str, float], *inputs: Tensor) -> Any:
        begin = time.perf_counter()
        out = run(*inputs)
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        seconds[name] += time.perf_counter() - begin
        return out

    def result(
        self, sums: _Sums, sets: Sequence[LayerSet], wer: dict[LayerSet, float], counted: Evaluations, anchor: str
    ) -> Scan:
        """Sums -> means."""
        context = self.context
        unpruned_loss = sums.loss[""] / sums.tokens
        depth = context.depth - self.first  # number of layers that the scan ran

        def scored(layers: LayerSet) -> SetScore:
            key = set_key(layers)
            return SetScore(
                removed_layers=layers,
                drift=(sums.drift[key] / sums.reference) ** 0.5,
                delta_loss=sums.loss[key] / sums.tokens - unpruned_loss if key in sums.loss else None,
                delta_wer=wer[layers] - wer[()] if layers in wer else None,
            )

        def cka(i: int) -> float:
            cross, own, other = (sums.hsic[k] for k in (f"{i}-{i + 1}", f"{i}-{i}", f"{i + 1}-{i + 1}"))
            return cross / (own * other) ** 0.5

        return Scan(
            study=context.config.name,
            anchor=anchor,
            encoder_layers=context.depth,
            removable=context.config.removable(context.depth),
            utterances=len(self.chosen),
            unpruned_loss=unpruned_loss,
            unpruned_wer=wer.get(()),
            sets=tuple(scored(s) for s in sets if s),
            layers=tuple(
                LayerScore(
                    layer=self.first + i,
                    block_influence=1 - sums.cosine[str(i)] / sums.positions,
                    frobenius_change=(sums.change[str(i)] / sums.size[str(i)]) ** 0.5,
                    cka_distance=1 - cka(i),
                )
                for i in range(depth)
            ),
            first=self.first,
            angular=tuple(
                tuple(sums.cosine[f"{begin}-{length}"] / sums.positions for begin in range(depth - length + 1))
                for length in range(1, depth + 1)
            ),
            evaluations=counted,
        )


def gram_matrix(features: Tensor) -> Tensor:
    """(n, D) -> linear Gram matrix (n, n) of the centred features, its diagonal zero."""
    features = features - features.mean(0)
    return (features @ features.T).fill_diagonal_(0)


def unbiased_hsic(a: Tensor, b: Tensor) -> float:
    """The unbiased Hilbert-Schmidt independence criterion of two Gram matrices without diagonals (Song et al. 2012)."""
    n = len(a)
    a, b = a.double(), b.double()
    total = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)
    return float(total / (n * (n - 3)))
