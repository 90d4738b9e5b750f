"""The importance scan: its tree of sets, and what it measures on toy models against doing it one by one."""

import math
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch

from prunesearch.commands.scan import scan as run_scan
from prunesearch.report.scan import render_scan_page
from prunesearch.speech.audio import read_audio
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.importance import Scan, evaluations, family, prefixes, spearman
from prunesearch.training import importance_scan as scanning
from prunesearch.training.anchor import anchor_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.importance_scan import ScanSettings, importance_scan
from tests.conftest import LAYERS, write_study


@pytest.mark.parametrize(("depth", "most"), [(4, 1), (6, 2), (10, 2), (6, 3), (32, 2)])
def test_the_tree_runs_each_layer_once_per_distinct_prefix(depth: int, most: int) -> None:
    sets = family(range(depth), most)
    counted = evaluations(sets, 0, depth)
    by_hand = sum(math.comb(layer, k) for layer in range(depth) for k in range(most + 1))
    assert counted.tree == by_hand
    assert counted.one_by_one == sum(depth - len(s) for s in sets)
    if most == 2 and depth >= 10:
        assert counted.tree <= 0.4 * counted.one_by_one


def test_a_prefix_is_kept_until_its_last_branch() -> None:
    assert prefixes([(), (1, 3), (1, 4)]) == {(): -1, (1,): 4, (1, 3): -1, (1, 4): -1}
    assert prefixes([(2, 5)]) == {(): 2, (2,): 5, (2, 5): -1}


def test_spearman_agrees_with_its_definition() -> None:
    rng = random.Random(0)
    a, b = [rng.random() for _ in range(20)], [rng.random() for _ in range(20)]
    places = [sorted(v).index(x) for v in (a,) for x in v], [sorted(v).index(x) for v in (b,) for x in v]
    squares = sum((x - y) ** 2 for x, y in zip(*places, strict=True))
    assert spearman(a, b) == pytest.approx(1 - 6 * squares / (20 * 399))
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1], [1, 2]))


@pytest.fixture(scope="module")
def scanned(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scan]:
    file = write_study(tmp_path_factory.mktemp("scan"), toy)
    return file, run_scan(file, utterances=6, with_wer=True, check=True)


def test_a_scan_equals_removing_each_set_separately(scanned: tuple[Path, Scan]) -> None:
    file, found = scanned
    context = TrainingContext.open(load_study(file))
    corpus = context.corpora["dev"]
    chosen = sorted(random.Random(context.config.seed).sample(range(len(corpus)), 6))
    reader = context.system.attach(anchor_projector(context).eval())

    def measured(layers: tuple[int, ...]) -> tuple[float, list[torch.Tensor]]:
        loss, audio, tokens = 0.0, [], 0
        for i in chosen:
            mel = context.encoder.features(read_audio(corpus[i].audio), context.device)[None]
            states, lengths = context.pruned_encoder(Candidate(layers)).encode(mel, torch.tensor([mel.shape[-1]]))
            target = context.system.target(corpus[i].target, corpus[i].language)
            loss += reader.loss_sum(states, lengths, [target]).item()
            tokens += len(target.tokens)
            audio.append(reader.projector(states, lengths)[0])
        return loss / tokens, audio

    with torch.no_grad():
        whole, output = measured(())
        assert found.unpruned_loss == pytest.approx(whole, rel=1e-4)
        size = sum(a.square().sum() for a in output).sqrt()
        for score in found.sets:
            loss, without = measured(score.removed_layers)
            assert score.delta_loss == pytest.approx(loss - whole, abs=1e-4)
            drift = sum((a - b).square().sum() for a, b in zip(without, output, strict=True)).sqrt() / size
            assert score.drift == pytest.approx(drift.item(), rel=1e-3)
    assert [s.removed_layers for s in found.sets] == [(i,) for i in range(LAYERS)] + list(combinations(range(LAYERS), 2))
    assert all((s.delta_wer is None) == (len(s.removed_layers) > 1) for s in found.sets)
    assert found.evaluations.tree_seconds
    assert found.evaluations.one_by_one_seconds


def test_layer_criteria_equal_their_definitions(scanned: tuple[Path, Scan]) -> None:
    file, found = scanned
    context = TrainingContext.open(load_study(file))
    scanner = scanning.Scanner(context, anchor_projector(context), 6, 11)
    befores, afters = [], []
    for indices in scanner.batches:
        hidden, lengths = scanner.prefix.batch(indices, context.device)
        path = [states for _, states, is_end in scanner.tree(hidden, lengths, [()]) if not is_end]
        for row, length in enumerate(lengths.tolist()):
            befores.append(path[1][row, :length])
            afters.append(path[2][row, :length])
    before, after = torch.cat(befores), torch.cat(afters)
    layer = found.layers[1]
    cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert layer.block_influence == pytest.approx(1 - cosines.mean().item(), abs=1e-5)
    assert layer.frobenius_change == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)
    assert found.angular[0][1] == pytest.approx(cosines.clamp(-1, 1).acos().mean().item() / math.pi, abs=1e-4)
    assert len(found.angular) == LAYERS
    assert [len(row) for row in found.angular] == [4, 3, 2, 1]
    assert 0 <= layer.cka_distance <= 1


def test_cka_is_one_for_a_rotation_and_near_zero_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(400, 8, generator=generator), torch.randn(400, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]

    def cka(a: torch.Tensor, b: torch.Tensor) -> float:
        one, other = scanning.gram_matrix(a), scanning.gram_matrix(b)
        hsic = scanning.unbiased_hsic
        return hsic(one, other) / math.sqrt(hsic(one, one) * hsic(other, other))

    assert cka(x, 3 * x @ rotation + 100) == pytest.approx(1, abs=1e-5)
    assert abs(cka(x, noise)) < 0.02


def timeless(scan: Scan) -> Scan:
    return scan.model_copy(update={"screening_seconds": 0.0})


def test_a_killed_scan_continues(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "BATCH", 2)
    file = write_study(tmp_path, toy)
    calm = importance_scan(TrainingContext.open(load_study(file)), ScanSettings(utterances=6))
    (tmp_path / "run" / "scan" / "scan.json").unlink()
    for finished in (tmp_path / "run" / "scan").glob("*.json"):
        finished.unlink()

    batch, ran = scanning.Scanner._batch, []

    def once_then_killed(self: scanning.Scanner, indices: list[int], *rest: object) -> None:
        ran.append(indices)
        if len(ran) == 2:
            raise KeyboardInterrupt
        batch(self, indices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scanning.Scanner, "_batch", once_then_killed)
    context = TrainingContext.open(load_study(file))
    with pytest.raises(KeyboardInterrupt):
        importance_scan(context, ScanSettings(utterances=6))
    assert timeless(importance_scan(context, ScanSettings(utterances=6))) == timeless(calm)
    assert len(ran) == 1 + 1 + 2  # the batch that was interrupted is run again, the finished one is not
    assert timeless(importance_scan(context, ScanSettings(utterances=6))) == timeless(calm)
    assert len(ran) == 4


def test_a_study_from_scratch_can_be_scanned_and_the_scan_locks_its_definition(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, training={"init": "scratch", "steps": 1}, anchor={"steps": 5})
    assert run_scan(file, utterances=2).sets
    write_study(tmp_path, toy, training={"init": "scratch", "steps": 1}, anchor={"steps": 6})
    with pytest.raises(StudyError, match=r"anchor.steps: this study was started with 5"):
        run_scan(file, utterances=2)


def test_with_many_pairs_the_loss_is_measured_for_those_of_least_drift(toy: Path, tmp_path: Path) -> None:
    found = importance_scan(
        TrainingContext.open(load_study(write_study(tmp_path, toy))), ScanSettings(utterances=4, loss_sets=2)
    )
    pairs = [s for s in found.sets if len(s.removed_layers) == 2]
    asked = [s for s in pairs if s.delta_loss is not None]
    assert len(asked) == 2
    assert max(s.drift for s in asked) <= min(s.drift for s in pairs if s not in asked)
    assert all(s.delta_loss is not None for s in found.sets if len(s.removed_layers) == 1)


def test_a_scan_is_written_as_a_page_and_a_figure(scanned: tuple[Path, Scan]) -> None:
    file, found = scanned
    folder = file.parent / "run" / "scan"
    assert (folder / "scan.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "scan.html").read_text()
    assert page == render_scan_page(found)
    assert "http" not in page
    interaction = found.interactions()[(0, 1)]
    costs = found.score("delta_loss")
    assert interaction == pytest.approx(costs[0, 1] - costs[0,] - costs[1,])
    assert f"{round(interaction, 3) + 0.0:.3f}" in page
