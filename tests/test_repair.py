"""Closed-form repair: ridge regression against its definition, and what it does for pruned encoders."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.commands.confirm import write_confirmation
from prunesearch.commands.export import export
from prunesearch.commands.launch import launch
from prunesearch.commands.status import status
from prunesearch.model.system import SpeechEncoder
from prunesearch.report import write_report
from prunesearch.report.confirmation import confirmation_file
from prunesearch.report.verdict import verdict
from prunesearch.speech.text import paper
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import completed_definition, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.interrupt import Interrupted
from prunesearch.study.record import ENCODER_FILE, RunRecord, read_records, read_utterances, record_folder
from prunesearch.training.context import TrainingContext
from prunesearch.training.finetune import FineTune, restore, trainable
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
def test_a_map_without_a_bias_gets_none_and_minimises_the_objective_without_one(ridge: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3, bias=False)
    (x, y), (held_x, held_y) = rows(50, 1), rows(30, 2)
    x, held_x = x + 2, held_x + 2  # means that a bias would take up
    found = solve(sums(linear, x, y), sums(linear, held_x, held_y), ladder=(ridge,))
    assert found.bias is None
    strength = ridge * (x.double() ** 2).sum(0).mean()
    weight = found.weight.requires_grad_()
    change = (weight - linear.weight.detach().double()).square().sum()
    loss = (x.double() @ weight.T - y.double()).square().sum() + strength * change
    assert float(torch.autograd.grad(loss, weight)[0].abs().max()) < 1e-3
    error = (held_x.double() @ found.weight.detach().T - held_y.double()).square().sum()
    assert found.error * len(held_x) == pytest.approx(float(error), rel=1e-5)


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


def test_a_ridge_below_the_rounding_errors_is_not_taken() -> None:
    """A few large inputs that move together: in fp32, their products hide the ridge, and the sums are not positive definite."""
    generator = torch.Generator().manual_seed(0)
    large = 1e4 * torch.randn(900, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    x = torch.cat([torch.randn(900, 2040, generator=generator), large], 1)
    y = x[:, :3] + 0.1 * torch.randn(900, 3, generator=generator)
    torch.manual_seed(0)
    linear = nn.Linear(2048, 3)
    fit, held_out = sums(linear, x[:600], y[:600], 600), sums(linear, x[600:], y[600:], 300)
    ladder = (1e-10, 1e-9, 1e-2)
    products = fit.centred(*fit.means)[0]
    products.diagonal().add_(ladder[1] * products.diagonal().mean())
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(products)
    found = solve(fit, held_out, ladder)
    assert found.ridge == ladder[2]
    assert found.weight.isfinite().all()
    assert found.unexplained <= 1 + 1e-6, "never worse than the map was"


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


def _repaired(context: TrainingContext, removed: tuple[int, ...]) -> SpeechEncoder:
    repair = Repair(context, removed)
    repair.layers()
    return repair.encoder


def drift(context: TrainingContext, encoder: object, indices: list[int]) -> float:
    """Relative distance of an encoder's states from those of the unpruned encoder."""
    own = context.encoded(encoder, "train", indices).values  # type: ignore[arg-type]
    full = context.encoded(context.encoder, "train", indices).values
    return float((own - full).norm() / full.norm())


@pytest.mark.parametrize("removed", [(3,), (2, 3), (1,), (0,), (0, 2)])
def test_a_repaired_encoder_is_nearer_to_the_unpruned_one(context: TrainingContext, removed: tuple[int, ...]) -> None:
    repaired = _repaired(context, removed)
    pruned = context.pruned_encoder(Candidate(removed))
    assert sum(p.numel() for p in repaired.module.parameters()) == sum(p.numel() for p in pruned.module.parameters())
    everyone = context.repair_utterances
    assert drift(context, repaired, everyone) < 0.9 * drift(context, pruned, everyone)


def test_only_maps_from_the_lowest_cut_upwards_change(context: TrainingContext) -> None:
    repaired, pruned = _repaired(context, (2,)), context.pruned_encoder(Candidate((2,)))
    before = pruned.module.state_dict()
    changed = {name for name, tensor in repaired.module.state_dict().items() if not torch.equal(tensor, before[name])}
    maps = {"layers.1.fc2", "layers.2.fc2", "layers.2.self_attn.out_proj"}  # of layers 1 and 3, and not of layer 0
    assert changed == {f"{name}.{part}" for name in maps for part in ("weight", "bias")}
    assert torch.equal(context.encoder.layers[1].fc2.weight, before["layers.1.fc2.weight"]), "the original keeps its weights"


def test_without_removed_layers_nothing_is_repaired(context: TrainingContext) -> None:
    encoder, projector, summary = start_of(context, Candidate())
    assert summary is None
    assert encoder.layers[0] is context.encoder.layers[0]
    other, _, _ = start_of(context, Candidate((), 4))
    assert other.module.state_dict().keys() == encoder.module.state_dict().keys()
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
    made = [_repaired(c, candidate.removed_layers).module.state_dict() for c in contexts]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])

    tested = decode_test(contexts[0], first)
    assert tested.test is not None
    kept = record_folder(contexts[0].records, candidate) / ENCODER_FILE
    assert kept.exists()
    from_file = repaired_encoder(contexts[0], candidate).module.state_dict()
    assert all(torch.equal(from_file[name], made[0][name]) for name in made[0])


def test_maps_of_another_encoder_are_refused(context: TrainingContext) -> None:
    pruned = context.pruned_encoder(Candidate((1,)))
    with pytest.raises(ValueError, match=r"belong to another encoder: layers\.9\.fc2\.weight"):
        pruned.with_maps({"layers.9.fc2.weight": torch.zeros(1)})


def test_a_study_without_training_is_a_front_of_repaired_candidates(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 0, "repair": "layers"}, search={"trials": 5})
    launch(file)
    records = read_records(file.parent / "run" / "records")
    assert sorted(r.name for r in records if r.name) == ["top2", "unpruned"]
    assert {r.lora_rank for r in records} == {0}
    assert {r.steps for r in records} == {0}
    assert len(records) == 5 == status(file)["settled"]
    for record in records:
        assert [rung.step for rung in record.rungs] == [0]
        assert record.dev is not None
        assert record.rungs[0].errors == record.dev.errors
    said = " ".join(verdict(write_report(load_study(file))))
    assert "top2+lora" not in said, "nothing here has LoRA"
    assert "top2" in said


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


def test_a_projector_from_scratch_is_not_repaired(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"training: repair must be layers or none with init = scratch, got 'projector'"):
        load_study(write_study(tmp_path / "a", toy, training={"init": "scratch", "repair": "projector"}))
    scratch = TrainingContext.open(load_study(write_study(tmp_path / "b", toy, training={"init": "scratch"})))
    _, projector, summary = start_of(scratch, Candidate((3,)))
    assert summary is not None
    assert summary.ridge.keys() == {"2.fc2"}
    assert torch.equal(projector.up.weight, scratch.fresh_projector().up.weight)


def test_a_study_of_an_earlier_version_goes_on_without_repair(toy: Path, tmp_path: Path) -> None:
    settings = {"text": {"metric": "wer"}, "search": {"trials": 1}}
    file = write_study(tmp_path / "s", toy, training={"repair": "none", "interpolate": False}, **settings)
    launch(file)
    definition = file.parent / "run" / "definition.json"
    old = json.loads(definition.read_text())
    for key in ("repair", "repair_utterances", "interpolate"):
        del old["training"][key]
    del old["data"]["repair"], old["text"]["metric"]
    assert completed_definition(old) == load_study(file).definition()
    definition.write_text(json.dumps(old))
    (file.parent / "run" / "journal.log").unlink()
    launch(file)
    write_study(tmp_path / "s", toy, training={"interpolate": False}, **settings)
    with pytest.raises(
        StudyError, match=r"training\.repair: this study was started with 'none', the study file now says 'layers'"
    ):
        launch(file)


# Recordings without transcripts


def without_texts(toy: Path, folder: Path, split: str = "dev") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (toy / f"{split}.jsonl").read_text().splitlines()]
    lines = [json.dumps({"audio": str(toy / row["audio"])}) for row in rows]
    (folder / "untranscribed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "untranscribed.jsonl"


def test_a_repair_can_be_fitted_on_recordings_without_transcripts(toy: Path, tmp_path: Path) -> None:
    manifest = str(without_texts(toy, tmp_path, "test"))
    with pytest.raises(StudyError, match=r"data\.repair: must have at least 8 utterances, got 6"):
        launch(write_study(tmp_path / "few", toy, data={"repair": manifest}))
    file = write_study(tmp_path / "s", toy, data={"repair": [manifest, str(toy / "train.jsonl")]}, search={"trials": 5})
    launch(file)
    records = read_records(file.parent / "run" / "records")
    assert {r.repair.utterances for r in records if r.repair} == {30}
    assert {r.state for r in records} == {"complete"}
    context = TrainingContext.open(load_study(file))
    assert not {*context.held_out} & {i for batch in context.budget().batches for i in batch}
    assert sum(map(len, context.streams.fit + context.streams.held_out)) == 30


def test_recordings_for_repairs_that_nothing_reads_are_an_error(toy: Path, tmp_path: Path) -> None:
    manifest = str(without_texts(toy, tmp_path))
    with pytest.raises(StudyError, match=r"training: repair must be layers or projector with data\.repair, got 'none'"):
        load_study(write_study(tmp_path / "s", toy, data={"repair": manifest}, training={"repair": "none"}))
    with pytest.raises(StudyError, match=r"dev and repair must not share a source"):
        load_study(write_study(tmp_path / "t", toy, data={"repair": str(toy / "dev.jsonl")}))


# Between the start and the trained weights


def held_out_loss(context: TrainingContext, record: RunRecord) -> float:
    """In nats per token, computed in one batch with the record's weights."""
    candidate = record.candidate
    with context.system.reader(context.fresh_projector(), candidate.lora_rank) as reader, torch.no_grad():
        restore(trainable(reader), load_file(record_folder(context.records, candidate) / "weights.safetensors"))
        reader.projector.eval()
        reader.model.eval()
        states = context.encoded(repaired_encoder(context, candidate), "train", context.held_out)
        hidden, lengths = states.batch(context.held_out, context.device)
        return float(reader.loss(hidden, lengths, [context.targets[i] for i in context.held_out]))


def test_the_point_with_the_smallest_held_out_loss_is_kept(toy: Path, tmp_path: Path) -> None:
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy)))
    record = train_and_score(context, Candidate((1,), 2))
    assert [tried.share for tried in record.interpolation] == [0, 0.25, 0.5, 0.75, 1]
    losses = [tried.loss for tried in record.interpolation]
    assert held_out_loss(context, record) == pytest.approx(min(losses), rel=1e-3)
    assert record.share == [0, 0.25, 0.5, 0.75, 1][losses.index(min(losses))]


def test_of_a_training_that_harms_nothing_is_kept(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = itertools.count(1)
    monkeypatch.setattr(FineTune, "_held_out_loss", lambda self: float(next(growing)))
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, training={"learning_rate": 1.0})))
    record = train_and_score(context, Candidate((1,), 2))
    assert record.share == 0
    assert record.dev is not None
    assert record.dev.errors == record.rungs[0].errors, "the repair alone"


def test_without_interpolation_the_trained_weights_are_kept(toy: Path, tmp_path: Path) -> None:
    settings = {"interpolate": False, "repair": "none"}
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, training=settings)))
    assert context.held_out == []
    record = train_and_score(context, Candidate((1,), 2))
    assert (record.interpolation, record.share) == ((), None)


def test_an_interpolation_is_not_made_twice(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is stopped while dev is decoded at the end goes on with the weights that were chosen."""
    contexts = [TrainingContext.open(load_study(write_study(tmp_path / name, toy))) for name in "ab"]
    expected = train_and_score(contexts[0], Candidate((1,), 2))
    decode = TrainingContext.decode
    decoded: list[str] = []

    def stopped(self: TrainingContext, *arguments: Any, **options: Any) -> Any:
        decoded.append("dev")
        if len(decoded) == 3:  # the anchor's, before the first step, after the last
            raise Interrupted
        return decode(self, *arguments, **options)

    monkeypatch.setattr(TrainingContext, "decode", stopped)
    with pytest.raises(Interrupted):
        train_and_score(contexts[1], Candidate((1,), 2))
    resumed = train_and_score(contexts[1], Candidate((1,), 2))
    assert {**resumed.outcome(), "study": ""} == {**expected.outcome(), "study": ""}
    files = [load_file(record_folder(c.records, Candidate((1,), 2)) / "weights.safetensors") for c in contexts]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_study_without_training_is_confirmed_by_training(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, training={"steps": 0}, search={"trials": 4})
    launch(file)
    config = load_study(file)
    write_confirmation(config, seeds=1, steps=None, init=None)
    confirmation = load_study(confirmation_file(config))
    assert confirmation.training.steps == 500
    assert {c.lora_rank for c in confirmation.fixed_candidates()} == {0, 4}, "with the baselines that have LoRA"
