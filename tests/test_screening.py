"""Screening: losses of layer sets after the repair, as a tree, against repairing each set on its own."""

import copy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from prunesearch.commands.scan import scan
from prunesearch.report.scan import render_scan_page, sets_table
from prunesearch.search.loss_model import loss_model
from prunesearch.search.screening_choice import next_to_screen
from prunesearch.study.config import load_study
from prunesearch.study.importance import LayerSet
from prunesearch.training import importance_scan
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.importance_scan import ScanSettings
from prunesearch.training.repair import Repair
from prunesearch.training.screening import Screen
from tests.conftest import write_study


def loss_after_repair(context: TrainingContext, removed: LayerSet) -> float:
    """On all of dev, in one batch, nats per token; the set is repaired on its own."""
    projector = copy.deepcopy(starting_projector(context)).eval()
    encoder = context.encoder
    if removed:
        repair = Repair(context, removed)
        if context.config.training.repair == "layers":
            repair.layers()
        repair.projector(projector)
        encoder = repair.encoder
    everyone = context.used("dev")
    hidden, lengths = context.encoded(encoder, "dev", everyone).batch(everyone, context.device)
    targets = [context.system.target(u.target, u.language) for u in (context.corpora["dev"][i] for i in everyone)]
    with torch.no_grad():
        return float(context.system.attach(projector).loss(hidden, lengths, targets))


@pytest.mark.parametrize("repair", ["layers", "projector"])
def test_a_tree_of_sets_is_repaired_as_each_set_on_its_own(toy: Path, tmp_path: Path, repair: str) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, training={"repair": repair})))
    sets = [s for k in range(4) for s in combinations(range(4), k)]  # up to three of four layers, the lowest ones included
    found = dict(Screen(context, starting_projector(context).eval()).measure(sets))
    assert sorted(found) == sorted(sets)
    for layers, screened in found.items():
        assert screened.loss == pytest.approx(loss_after_repair(context, layers), rel=1e-4), layers
        assert (screened.residual > 0) == bool(layers)


def test_every_size_is_screened_and_nothing_twice(toy: Path, tmp_path: Path) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, search={"max_removed": 3})))
    found = importance_scan.importance_scan(context, ScanSettings(utterances=6, screened=11), next_to_screen)
    losses = found.score("repaired_loss")
    assert len(losses) == 11
    assert {len(s) for s in losses} == {1, 2, 3}
    assert found.increases()[()] == found.screening_unpruned_loss


def test_a_killed_screening_continues(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ScanSettings(utterances=6, screened=9)
    calm = importance_scan.importance_scan(
        TrainingContext.open(load_study(write_study(tmp_path / "calm" / "s", toy))), settings, next_to_screen
    )
    context = TrainingContext.open(load_study(write_study(tmp_path / "killed" / "s", toy)))
    measured: list[LayerSet] = []
    measure = Screen._left

    def killed(self: Screen, layers: LayerSet, behind: object) -> object:
        measured.append(layers)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(self, layers, behind)  # type: ignore[arg-type]

    monkeypatch.setattr(Screen, "_left", killed)
    with pytest.raises(KeyboardInterrupt):
        importance_scan.importance_scan(context, settings, next_to_screen)
    assert importance_scan.importance_scan(context, settings, next_to_screen).sets == calm.sets
    assert len(measured) == 10 + 1, "one set was begun twice; the unpruned system is screened, too"


def test_a_scan_searches_by_the_loss_after_the_repair_where_the_study_repairs(toy: Path, tmp_path: Path) -> None:
    repairing = scan(write_study(tmp_path / "a" / "s", toy))
    assert repairing.criterion == "repaired_loss"
    assert {len(s) for s in repairing.score("repaired_loss")} == {1, 2}, "max_removed is 2"
    assert repairing.screening_seconds > 0
    best = sets_table(repairing, most=1)
    assert [row[0] for row in best.rows] == ["1", "2"]
    losses = repairing.score("repaired_loss")
    assert best.rows[0][1] == str(min((s for s in losses if len(s) == 1), key=losses.__getitem__)[0])
    assert "Best sets of each size" in render_scan_page(repairing)
    published = scan(write_study(tmp_path / "b" / "s", toy, training={"repair": "none"}))
    assert published.criterion == "delta_loss"
    assert published.score("repaired_loss") == {}
    assert "Best sets of each size" not in render_scan_page(published)


def test_a_set_has_its_own_loss_where_it_was_measured_and_a_likely_one_elsewhere() -> None:
    scan = {(): 0.1, (0,): 0.1, (1,): 0.2, (2,): 0.3, (3,): 0.4, (0, 1): 0.3, (0, 1, 2): 5.0}
    model = loss_model((0, 1, 2, 3), scan)
    assert model is not None
    losses, variances = model(np.array([[1.0, 1, 1, 0], [1, 1, 0, 1]]))
    assert losses[0, -1] == pytest.approx(np.log(5.1))
    assert variances[0] == 0 < variances[1]
    assert loss_model((0, 1, 2, 3), {(): 0.1}) is None


def test_the_choice_of_sets_finds_the_best_ones_of_every_size() -> None:
    """Losses that no sum of layers explains: neighbours cost less together, and some pairs more."""
    rng = np.random.default_rng(3)
    single, pair = rng.lognormal(-2, 0.8, 10), rng.normal(0, 0.1, (10, 10))

    def increase(layers: LayerSet) -> float:
        beyond = sum(pair[i, j] - 0.4 * (j == i + 1) * min(single[i], single[j]) for i, j in combinations(layers, 2))
        return float(np.expm1(max(0.05, sum(single[i] for i in layers) + beyond)))

    known: dict[LayerSet, float] = {}
    while asked := next_to_screen(known, range(10), 5, 80):
        assert not known.keys() & set(asked)
        known |= {s: increase(s) if s else 1.0 for s in asked}
    assert len(known) == 81
    for size in range(1, 6):
        ordered = sorted(map(increase, combinations(range(10), size)))
        assert min(v for s, v in known.items() if len(s) == size) <= ordered[2], size


def test_a_small_space_is_screened_as_a_whole() -> None:
    known: dict[LayerSet, float] = {}
    while asked := next_to_screen(known, (1, 2, 5), 3, 100):
        known |= {s: float(sum(s)) for s in asked}
    assert len(known) == 8
