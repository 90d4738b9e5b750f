"""The importance scan: the anchor's system with layers removed, and nothing trained.

Sets of layers form a tree. The states that sets have in common are computed once, and all sets that are alive at a layer
go through it as one batch. Shapes: B batch, T positions, D width, A audio embeddings.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from prunesearch.model.encoder import run_layers
from prunesearch.model.slam import SpeechLlm
from prunesearch.speech.audio import version_of
from prunesearch.study.candidate import Candidate
from prunesearch.study.importance import (
    Evaluations,
    LayerScore,
    LayerSet,
    Scan,
    SetScore,
    evaluations,
    family,
    prefixes,
    read_scan,
    write_scan,
)
from prunesearch.study.interrupt import locked
from prunesearch.study.record import SplitResult, write_atomically
from prunesearch.training.batches import by_length
from prunesearch.training.context import TrainingContext
from prunesearch.training.decode import transcribe
from prunesearch.training.device import arithmetic

ROWS = 128  # sequences that go through a layer at once
BATCH = 16  # utterances, if the end states of all sets fit
END_STATES = 2 * 2**30  # bytes that they may take
CKA_POSITIONS = 2048  # of a batch, at most: the Gram matrices are squares of this


class _Sums(BaseModel):
    """What batches have added up to, by set or by layer; kept on disk, so that a killed scan goes on."""

    batches: int = 0
    seconds: float = 0.0
    drift: dict[str, float] = {}  # squared error of the projector's output; the whole output's own under ""
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


def _key(layers: LayerSet) -> str:
    return ",".join(map(str, layers))


def scan(
    workshop: TrainingContext,
    most: int = 2,
    utterances: int = 64,
    loss_sets: int = 128,
    with_wer: bool = False,
    check: bool = False,
) -> Scan:
    """Score every set of at most `most` removable layers on `utterances` of dev, going on where a killed scan stopped.

    The loss is measured for single layers, and for the `loss_sets` larger sets of least projector drift; `with_wer` decodes
    for single layers; `check` runs every set by itself as well, compares, and takes the time of both. A scan that is
    finished is not repeated. The result lies in `scan/scan.json` in the study's run folder.
    """
    folder = workshop.config.run_folder / "scan"
    folder.mkdir(parents=True, exist_ok=True)
    weights = workshop.anchor_weights if workshop.anchor_weights.exists() else workshop.anchor()
    with locked(folder / "lock", workshop.check):  # the other workers of the study wait, and find it finished
        return _scan(workshop, folder, weights, most, utterances, loss_sets, with_wer, check)


def _scan(
    workshop: TrainingContext,
    folder: Path,
    weights: Path,
    most: int,
    utterances: int,
    loss_sets: int,
    with_wer: bool,
    check: bool,
) -> Scan:
    anchor = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    removable = workshop.config.removable(workshop.depth)
    dev = [(u.id, u.target, version_of(u.audio)) for u in workshop.corpora["dev"]]
    settings = [workshop.config.fingerprint(), anchor, dev, removable, most, utterances, loss_sets, with_wer, check]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    if finished := read_scan(folder / f"{name}.json"):
        write_scan(folder / "scan.json", finished)
        return finished
    sets = family(removable, most)
    scanner = _Scanner(workshop, weights, utterances, len(sets))

    small = [s for s in sets if len(s) < 2]
    everything = len(sets) - len(small) <= loss_sets
    sums = scanner.run(folder / f"{name}.first", sets, set(sets if everything else small))
    if not everything:  # the LLM is asked about the most promising ones only
        best = sorted((s for s in sets if len(s) > 1), key=lambda s: sums.drift[_key(s)])[:loss_sets]
        sums.loss |= scanner.run(folder / f"{name}.second", [(), *best], set(best), statistics=False).loss
    counted = evaluations(sets, scanner.first, workshop.depth)
    wer = scanner.wer(small) if with_wer else {}
    if check:
        counted = counted.model_copy(update=scanner.compare(sets))
    result = scanner.result(sums, sets, wer, counted, anchor)
    write_scan(folder / f"{name}.json", result)
    write_scan(folder / "scan.json", result)
    for part in ("first", "second"):
        (folder / f"{name}.{part}").unlink(missing_ok=True)
    return result


class _Scanner:
    """The study's dev subset, and the anchor's system."""

    def __init__(self, workshop: TrainingContext, anchor: Path, utterances: int, sets: int):
        self.workshop = workshop
        self.first = workshop.shared_depth
        self.prefix = workshop.prefix("dev")
        corpus = workshop.corpora["dev"]
        chosen = sorted(random.Random(workshop.config.seed).sample(range(len(corpus)), min(utterances, len(corpus))))
        self.chosen = chosen
        longest = max(self.prefix.length(i) for i in chosen)
        one = sets * longest * self.prefix.values.shape[1] * self.prefix.values.element_size()
        batch = max(1, min(BATCH, END_STATES // one))
        self.batches = [[chosen[j] for j in b] for b in by_length([self.prefix.length(i) for i in chosen], batch)]
        self.texts = {i: workshop.llm.tokens(corpus[i].target) for i in chosen}
        projector = workshop.fresh_projector()
        projector.load_state_dict(load_file(anchor))
        self.slam = SpeechLlm(projector.eval(), workshop.llm, workshop.llm.model)

    def layer(self, states: Sequence[Tensor], lengths: Tensor, layer: int) -> list[Tensor]:
        """One layer on several sets' states (each (B, T, D)), as few batches."""
        batch = states[0].shape[0]
        step, out = max(1, ROWS // batch), []
        for begin in range(0, len(states), step):
            part = torch.cat(list(states[begin : begin + step]))
            ran = run_layers(self.workshop.encoder, part, lengths.repeat(len(part) // batch), layer, layer + 1)
            out.extend(ran.split(batch))
        return out

    def tree(self, hidden: Tensor, lengths: Tensor, sets: Sequence[LayerSet]) -> Iterator[tuple[LayerSet, Tensor, bool]]:
        """Yields each set's states behind the last layer, and before it the unpruned ones before and behind each layer.

        The last item tells the two apart: True for a set's end. Nodes of the tree are dropped once nothing follows them.
        """
        until = prefixes(sets)
        alive: dict[LayerSet, Tensor] = {(): hidden}
        depth = self.workshop.depth
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
        states = self.workshop.encoder.layer_norm(hidden)
        audio, audio_lengths = self.slam.projector(states, lengths)
        inside = torch.arange(audio.shape[1], device=audio.device) < audio_lengths[:, None]
        return states, audio.float() * inside[..., None]

    @torch.inference_mode()
    def run(self, path: Path, sets: Sequence[LayerSet], with_loss: set[LayerSet], statistics: bool = True) -> _Sums:
        """All batches, from where the file says that an earlier run has come."""
        workshop = self.workshop
        sums = _Sums.model_validate_json(path.read_text()) if path.exists() else _Sums()
        for done, indices in list(enumerate(self.batches))[sums.batches :]:
            begin = time.perf_counter()
            self._batch(indices, sets, with_loss, statistics, sums)
            sums.batches = done + 1
            sums.seconds += time.perf_counter() - begin
            write_atomically(path, sums.model_dump_json())
            workshop.progress("scanning", done + 1, len(self.batches))
        return sums

    def _batch(
        self, indices: list[int], sets: Sequence[LayerSet], with_loss: set[LayerSet], statistics: bool, sums: _Sums
    ) -> None:
        hidden, lengths = self.prefix.batch(indices, self.workshop.device)
        texts = [self.texts[i] for i in indices]
        path: list[Tensor] = []
        whole = None
        with arithmetic(self.workshop.device, self.workshop.dtype):
            for node, states, is_end in self.tree(hidden, lengths, sets):
                if not is_end:
                    path.append(states)
                    continue
                encoded, audio = self.projected(states, lengths)
                whole = audio if whole is None else whole  # the empty set comes first
                sums.add("drift", _key(node), (audio - whole).square().sum().item())
                if node in with_loss:
                    sums.add("loss", _key(node), self.slam.loss_sum(encoded, lengths, texts).item())
        assert whole is not None
        sums.reference += whole.square().sum().item()
        sums.tokens += sum(map(len, texts))
        if statistics:
            self._statistics(path, lengths, sums)

    def _statistics(self, path: Sequence[Tensor], lengths: Tensor, sums: _Sums) -> None:
        """What the layers of the unpruned encoder do to their input."""
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
            gram = _gram(states[::every])
            sums.add("hsic", f"{i}-{i}", _hsic(gram, gram))
            if before is not None:
                sums.add("hsic", f"{i - 1}-{i}", _hsic(before, gram))
            before = gram

    def wer(self, sets: Sequence[LayerSet]) -> dict[LayerSet, float]:
        """Dev WER of the subset, decoded."""
        workshop, found = self.workshop, {}
        for done, layers in enumerate(sets):
            states = workshop.encoded(workshop.pruned_encoder(Candidate(layers)), "dev", self.chosen)
            results = transcribe(
                self.slam, states, workshop.corpora["dev"], self.chosen, workshop.config, workshop.device, workshop.dtype
            )
            found[layers] = SplitResult.of(results).errors.wer
            workshop.progress("decoding without a layer", done + 1, len(sets))
        return found

    @torch.inference_mode()
    def compare(self, sets: Sequence[LayerSet]) -> dict[str, float]:
        """Seconds of the encoder as a tree, and set by set, in turns over the batches.

        Raises AssertionError when the two do not agree.
        """
        workshop, seconds = self.workshop, {"tree_seconds": 0.0, "one_by_one_seconds": 0.0}

        encoders = {s: workshop.pruned_encoder(Candidate(s)) for s in sets}

        def one_by_one(hidden: Tensor, lengths: Tensor) -> dict[LayerSet, Tensor]:
            return {s: run_layers(encoder, hidden, lengths, self.first) for s, encoder in encoders.items()}

        def as_tree(hidden: Tensor, lengths: Tensor) -> dict[LayerSet, Tensor]:
            return {node: states for node, states, is_end in self.tree(hidden, lengths, sets) if is_end}

        for done, indices in enumerate(self.batches):
            hidden, lengths = self.prefix.batch(indices, workshop.device)
            with arithmetic(workshop.device, workshop.dtype):
                found = [
                    self._timed(f, k, seconds, hidden, lengths) for f, k in zip((as_tree, one_by_one), seconds, strict=True)
                ]
            for layers, states in found[0].items():
                difference = (states - found[1][layers]).norm() / states.norm()
                assert difference < (1e-4 if workshop.dtype == torch.float32 else 5e-2), (layers, difference)
            workshop.progress("comparing with one set at a time", done + 1, len(self.batches))
        return seconds

    def _timed(self, run: Callable[..., Any], name: str, seconds: dict[str, float], *inputs: Tensor) -> Any:
        begin = time.perf_counter()
        out = run(*inputs)
        if self.workshop.device.type == "cuda":
            torch.cuda.synchronize(self.workshop.device)
        seconds[name] += time.perf_counter() - begin
        return out

    def result(
        self, sums: _Sums, sets: Sequence[LayerSet], wer: dict[LayerSet, float], counted: Evaluations, anchor: str
    ) -> Scan:
        """Sums -> means."""
        workshop = self.workshop
        unpruned_loss = sums.loss[""] / sums.tokens
        depth = workshop.depth - self.first  # of the part that was looked at

        def scored(layers: LayerSet) -> SetScore:
            key = _key(layers)
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
            study=workshop.config.name,
            anchor=anchor,
            encoder_layers=workshop.depth,
            removable=workshop.config.removable(workshop.depth),
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


def _gram(features: Tensor) -> Tensor:
    """(n, D) -> linear Gram matrix (n, n) of the centred features, its diagonal zero."""
    features = features - features.mean(0)
    return (features @ features.T).fill_diagonal_(0)


def _hsic(a: Tensor, b: Tensor) -> float:
    """The unbiased Hilbert-Schmidt independence criterion of two Gram matrices without diagonals (Song et al. 2012)."""
    n = len(a)
    a, b = a.double(), b.double()
    total = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)
    return float(total / (n * (n - 3)))
