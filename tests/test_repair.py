"""Closed-form repair: ridge regression against its definition, and what it does for pruned encoders."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.commands.export import export
from prunesearch.commands.launch import launch
from prunesearch.commands.status import status
from prunesearch.model.encoder import with_repaired_maps
from prunesearch.speech.text import paper
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import completed_definition, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import ENCODER_FILE, read_records, read_utterances, record_folder
from prunesearch.training.context import TrainingContext
from prunesearch.training.recipe import decode_test, train_and_score
from prunesearch.training.repair import Repair, repaired_encoder, start_of
from prunesearch.training.ridge import NormalEquations, solve
from tests.conftest import write_study


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs and noisy outputs of a linear map with a bias."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, 6, generator=generator) @ mixing + 3
    truth = torch.randn(6, 3, generator=torch.Generator().manual_seed(98))
    return x, x @ truth - 1 + 0.3 * torch.randn(count, 3, generator=generator)


def sums(linear: nn.Linear, x: torch.Tensor, y: torch.Tensor, batch: int = 7) -> NormalEquations:
    equations = NormalEquations(linear)
    for start in range(0, len(x), batch):
        equations.add(x[start : start + batch], y[start : start + batch])
    return equations


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_a_solution_minimises_the_ridge_objective(ridge: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    x, y = rows(50, 1)
    found = solve(sums(linear, x, y), sums(linear, *rows(30, 2)), ladder=(ridge,))
    centred = (x - x.mean(0)).double()
    strength = ridge * (centred**2).sum(0).mean()

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        error = (x.double() @ weight.T + bias - y.double()).square().sum()
        return error + strength * (weight - linear.weight.detach().double()).square().sum()

    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    gradients = torch.autograd.grad(objective(weight, bias), (weight, bias))
    assert all(float(g.abs().max()) < 1e-3 for g in gradients), (
        "the objective is convex: where its gradient vanishes is its minimum"
    )


def test_the_ridge_with_the_smallest_held_out_error_is_taken_and_that_error_is_told() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    (x, y), (held_x, held_y) = rows(9, 1), rows(40, 2)

    def error(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return float((held_x.double() @ weight.T + bias - held_y.double()).square().sum())

    ladder = (1e-4, 1e-2, 1.0, 1e9)
    fit, held_out = sums(linear, x, y), sums(linear, held_x, held_y)
    each = {ridge: error(s.weight, s.bias) for ridge in ladder for s in [solve(fit, held_out, (ridge,))]}
    best = solve(fit, held_out, ladder)
    assert best.ridge == min(each, key=each.__getitem__)
    before = error(linear.weight.detach().double(), linear.bias.detach().double())
    assert best.unexplained == pytest.approx(each[best.ridge] / before, rel=1e-4)


def test_batches_change_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    linear, (x, y) = nn.Linear(6, 3), rows(50, 1)
    one, several = (solve(sums(linear, x, y, batch), sums(linear, x, y), (0.01,)) for batch in (50, 3))
    torch.testing.assert_close(one.weight, several.weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one.bias, several.bias, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def context(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingContext:
    return TrainingContext.open(
        load_study(write_study(tmp_path_factory.mktemp("repair") / "s", toy, training={"repair": "layers"}))
    )


def drift(context: TrainingContext, encoder: object, indices: list[int]) -> float:
    """Relative distance of an encoder's states from those of the unpruned encoder."""
    own = context.encoded(encoder, "train", indices).values  # type: ignore[arg-type]
    full = context.encoded(context.encoder, "train", indices).values
    return float((own - full).norm() / full.norm())


@pytest.mark.parametrize("removed", [(3,), (2, 3), (1,), (0,), (0, 2)])
def test_a_repaired_encoder_is_nearer_to_the_unpruned_one(context: TrainingContext, removed: tuple[int, ...]) -> None:
    repaired = Repair(context).encoder(removed)
    pruned = context.pruned_encoder(Candidate(removed))
    assert sum(p.numel() for p in repaired.parameters()) == sum(p.numel() for p in pruned.parameters())
    everyone = context.repair_utterances
    assert drift(context, repaired, everyone) < 0.9 * drift(context, pruned, everyone)


def test_only_maps_from_the_lowest_cut_upwards_change(context: TrainingContext) -> None:
    repaired, pruned = Repair(context).encoder((2,)), context.pruned_encoder(Candidate((2,)))
    before = pruned.state_dict()
    changed = {name for name, tensor in repaired.state_dict().items() if not torch.equal(tensor, before[name])}
    maps = {"layers.1.fc2", "layers.2.fc2", "layers.2.self_attn.out_proj"}  # of layers 1 and 3, and not of layer 0
    assert changed == {f"{name}.{part}" for name in maps for part in ("weight", "bias")}
    assert torch.equal(context.encoder.layers[1].fc2.weight, before["layers.1.fc2.weight"]), "the original keeps its weights"


def test_without_removed_layers_nothing_is_repaired(context: TrainingContext) -> None:
    encoder, projector, summary = start_of(context, Candidate())
    assert summary is None
    assert encoder.layers[0] is context.encoder.layers[0]
    other, _, _ = start_of(context, Candidate((), 4))
    assert other.state_dict().keys() == encoder.state_dict().keys()
    assert projector.up.weight.shape == context.fresh_projector().up.weight.shape


def test_the_layer_below_the_first_removable_one_is_not_shared(toy: Path, tmp_path: Path) -> None:
    for repair, shared in (("layers", 1), ("projector", 2), ("none", 2)):
        file = write_study(tmp_path / repair, toy, training={"repair": repair}, search={"removable_layers": [2, 3]})
        assert load_study(file).shared_layers(4) == shared


def test_a_repair_made_twice_is_the_same_bit_by_bit_and_kept_maps_restore_it(toy: Path, tmp_path: Path) -> None:
    candidate, contexts = Candidate((1, 2), 2), []
    for name in "ab":
        contexts.append(TrainingContext.open(load_study(write_study(tmp_path / name, toy, training={"repair": "layers"}))))
    first, second = (train_and_score(c, candidate) for c in contexts)
    assert {**first.outcome(), "study": ""} == {**second.outcome(), "study": ""}
    assert first.repair is not None
    assert first.repair.utterances == 24
    assert {*first.repair.ridge} == {"0.fc2", "3.out_proj", "3.fc2", "projector.up"}
    made = [Repair(c).encoder(candidate.removed_layers).state_dict() for c in contexts]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])

    tested = decode_test(contexts[0], first)
    assert tested.test is not None
    kept = record_folder(contexts[0].records, candidate) / ENCODER_FILE
    assert kept.exists()
    from_file = repaired_encoder(contexts[0], candidate).state_dict()
    assert all(torch.equal(from_file[name], made[0][name]) for name in made[0])


def test_maps_of_another_encoder_are_refused(context: TrainingContext) -> None:
    pruned = context.pruned_encoder(Candidate((1,)))
    with pytest.raises(ValueError, match=r"belong to another encoder: layers\.9\.fc2\.weight"):
        with_repaired_maps(pruned, {"layers.9.fc2.weight": torch.zeros(1)})


def test_a_study_without_training_is_a_front_of_repaired_candidates(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 0, "repair": "layers"}, search={"trials": 5})
    launch(file)
    records = read_records(file.parent / "run" / "records")
    assert [r.name for r in records if r.name] == ["unpruned", "top2"] or {r.name for r in records} >= {"unpruned", "top2"}
    assert {r.lora_rank for r in records} == {0}
    assert {r.steps for r in records} == {0}
    assert len(records) == 5 == status(file)["settled"]
    for record in records:
        assert [rung.step for rung in record.rungs] == [0]
        assert record.dev is not None
        assert record.rungs[0].errors == record.dev.errors


def test_every_trained_record_keeps_the_errors_before_training(context: TrainingContext) -> None:
    record = train_and_score(context, Candidate((0,), 2))
    assert [rung.step for rung in record.rungs] == [0]
    assert record.steps == 8


def test_an_exported_repaired_candidate_gives_the_trials_transcripts(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 2, "repair": "layers"}, search={"trials": 4})
    launch(file)
    config, candidate = load_study(file), Candidate((2, 3))
    (record_folder(config.run_folder / "records", candidate) / ENCODER_FILE).unlink()  # as of a candidate off the front
    export(file, tmp_path / "out", candidate=candidate.key)
    expected = read_utterances(config.run_folder / "records", candidate, "test") or []
    rows = [json.loads(line) for line in (toy / "test.jsonl").read_text().splitlines()]
    said = SlamAsr.from_pretrained(tmp_path / "out").transcribe([toy / row["audio"] for row in rows])
    assert [paper(text) for text in said] == [u.hypothesis for u in expected]
    assert "refitted by least squares on 24 utterances" in (tmp_path / "out" / "README.md").read_text()


def test_a_repair_needs_an_anchor(toy: Path, tmp_path: Path) -> None:
    assert load_study(write_study(tmp_path / "a", toy, training={"init": "scratch"})).training.repair == "none"
    with pytest.raises(StudyError, match=r"training: repair must be none with init = scratch, got 'layers'"):
        load_study(write_study(tmp_path / "b", toy, training={"init": "scratch", "repair": "layers"}))


def test_a_study_of_an_earlier_version_goes_on_without_repair(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"repair": "none"}, search={"trials": 1})
    launch(file)
    definition = file.parent / "run" / "definition.json"
    old = json.loads(definition.read_text())
    for key in ("repair", "repair_utterances"):
        del old["training"][key]
    assert completed_definition(old) == load_study(file).definition()
    definition.write_text(json.dumps(old))
    (file.parent / "run" / "journal.log").unlink()
    launch(file)
    write_study(tmp_path / "s", toy, training={"repair": "layers"}, search={"trials": 1})
    with pytest.raises(
        StudyError, match=r"training\.repair: this study was started with 'none', the study file now says 'layers'"
    ):
        launch(file)
