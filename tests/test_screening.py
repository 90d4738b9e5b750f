"""Screening: losses of layer sets after the repair, as a tree, against repairing each set on its own."""

import copy
from itertools import combinations
from pathlib import Path

import pytest
import torch

from prunesearch.commands.scan import scan
from prunesearch.model.slam import SpeechLlm
from prunesearch.report.scan import render_scan_page, sets_table
from prunesearch.search.surrogate import Surrogate
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.importance import LayerSet
from prunesearch.training import importance_scan
from prunesearch.training.anchor import starting_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.importance_scan import ScanSettings
from prunesearch.training.repair import Repair
from prunesearch.training.screening import Known, Screen, screen_sets
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
    texts = [context.llm.tokens(context.corpora["dev"][i].target) for i in everyone]
    with torch.no_grad():
        return float(SpeechLlm(projector, context.llm, context.llm.model).loss(hidden, lengths, texts))


@pytest.mark.parametrize("repair", ["layers", "projector"])
def test_a_tree_of_sets_is_repaired_as_each_set_on_its_own(toy: Path, tmp_path: Path, repair: str) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, training={"repair": repair})))
    sets = [s for k in range(4) for s in combinations(range(4), k)]  # up to three of four layers, the lowest ones included
    found = dict(Screen(context, starting_projector(context).eval()).measure(sets))
    assert sorted(found) == sorted(sets)
    for layers, screened in found.items():
        assert screened.loss == pytest.approx(loss_after_repair(context, layers), rel=1e-4), layers
        assert (screened.residual > 0) == bool(layers)


def test_every_size_is_screened_and_known_sets_are_not_measured_again(toy: Path, tmp_path: Path) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, search={"max_removed": 3})))
    counts: list[int] = []
    known: Known = {}
    screen_sets(Screen(context, starting_projector(context).eval()), known, most=11, on_set=counts.append)
    assert [sum(len(s) == size for s in known) for size in range(4)] == [1, 4, 3, 3]
    assert counts == list(range(1, 12))
    counts.clear()
    screen_sets(Screen(context, starting_projector(context).eval()), known, most=11, on_set=counts.append)
    assert counts == []


def test_a_killed_screening_continues(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ScanSettings(utterances=6, screened=9)
    calm = importance_scan.importance_scan(
        TrainingContext.open(load_study(write_study(tmp_path / "calm" / "s", toy))), settings
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
        importance_scan.importance_scan(context, settings)
    assert importance_scan.importance_scan(context, settings).sets == calm.sets
    assert len(measured) == 9 + 1, "one set was begun twice"


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


def test_the_surrogate_takes_a_sets_own_cost_where_it_was_measured() -> None:
    costs = {(0,): 0.1, (1,): 0.2, (2,): 0.3, (3,): 0.4, (0, 1): 0.3, (0, 1, 2): 5.0}
    surrogate = Surrogate((0, 1, 2, 3), (0,), costs)
    measured, sum_of_layers = surrogate.encode([Candidate((0, 1, 2)), Candidate((0, 1, 3))]).scan
    assert measured[1] > sum_of_layers[1] + 1, "more than the sum of its layers, which is smaller"
    assert measured[0] < sum_of_layers[0], "the sum itself is still a feature"
