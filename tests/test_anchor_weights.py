"""An anchor that was trained elsewhere: our own export, and the layouts of the published code and of SLAM-LLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunesearch import SlamAsr, export, launch, plan
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, read_record
from prunesearch.training.anchor import anchor_projector
from prunesearch.training.context import TrainingContext
from prunesearch.training.recipe import train_and_score
from tests.conftest import write_study

THEIRS = {"up": "linear1", "down": "linear2", "norm": "layer_norm"}


@pytest.fixture(scope="module")
def origin(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has trained an anchor, and the unpruned system with a LoRA of rank 4."""
    file = write_study(tmp_path_factory.mktemp("origin") / "s", toy, anchor={"steps": 60}, training={"interpolate": False})
    launch(file, trials=2)
    return file


@pytest.fixture(scope="module")
def exported(origin: Path) -> Path:
    """The unpruned system with its LoRA, exported."""
    export(origin, origin.parent / "lora", candidate="full+lora4")
    export(origin, origin.parent / "plain", candidate="full")
    return origin.parent


def with_theirs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{THEIRS[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in tensors.items()}


def record_of(file: Path, candidate: Candidate) -> RunRecord:
    config = load_study(file)
    record = read_record(config.run_folder / "records", candidate, config.name)
    assert record is not None
    return record


def untrained(toy: Path, folder: Path, weights: Path, **sections: dict[str, Any]) -> RunRecord:
    """The unpruned system of a study that starts from these weights, without a step of training."""
    file = write_study(folder, toy, anchor={"weights": str(weights)}, training={"steps": 0}, **sections)
    return train_and_score(TrainingContext.open(load_study(file)), Candidate())


@pytest.mark.parametrize("layout", ["export", "safetensors", "authors", "SLAM-LLM"])
def test_an_anchor_from_elsewhere_has_the_errors_of_where_it_came_from(
    origin: Path, exported: Path, toy: Path, tmp_path: Path, layout: str
) -> None:
    projector = load_file(exported / "lora" / "projector.safetensors")
    adapter = load_file(exported / "lora" / "adapter" / "adapter_model.safetensors")
    stored = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    weights = exported / "lora"
    if layout == "safetensors":
        save_file(projector, weights := tmp_path / "projector.safetensors")
    elif layout == "authors":
        torch.save({"projector": with_theirs(projector), "lora": stored, "epoch": 3}, weights := tmp_path / "best.pt")
    elif layout == "SLAM-LLM":
        names = {f"encoder_projector.{name}": tensor for name, tensor in with_theirs(projector).items()}
        torch.save({**names, **{f"llm.{name}": tensor for name, tensor in stored.items()}}, weights := tmp_path / "model.pt")
    record = untrained(toy, tmp_path / "s", weights)
    trained = record_of(origin, Candidate((), 4))
    assert trained.dev is not None
    assert record.dev is not None
    if layout == "safetensors":  # without the LoRA, it is another system
        assert {**record.provenance["models"]}.keys() == {"encoder", "llm", "anchor"}
    else:
        assert record.dev.errors == trained.dev.errors
    assert json.loads((tmp_path / "s" / "run" / "anchor" / "anchor.json").read_text())["steps"] == 0
    assert plan(tmp_path / "s").anchor_steps == 0


def test_a_plain_export_as_an_anchor_is_its_projector_bit_by_bit(exported: Path, toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s", toy, anchor={"weights": str(exported / "plain")})
    context = TrainingContext.open(load_study(file))
    stored = load_file(exported / "plain" / "projector.safetensors")
    found = anchor_projector(context).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert not context.trains_anchor
    launch(file, trials=3)
    assert record_of(file, Candidate((2, 3))).state == "complete"


def test_a_merged_lora_goes_into_the_export(exported: Path, toy: Path, tmp_path: Path) -> None:
    untrained(toy, tmp_path / "s", exported / "lora")
    with pytest.raises(StudyError, match=r"--no-llm: the anchor's LoRA is merged into the LLM"):
        export(tmp_path / "s", tmp_path / "out", candidate="full", with_llm=False)
    export(tmp_path / "s", tmp_path / "out", candidate="full")
    first, second = SlamAsr.from_pretrained(exported / "lora"), SlamAsr.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    states, lengths = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 11])
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(
            second.reader.logits(states, lengths, tokens), first.reader.logits(states, lengths, tokens), atol=1e-4, rtol=1e-4
        )


def _export_of_pruned(exported: Path, folder: Path) -> Path:
    shutil.copytree(exported / "plain", folder)
    settings = json.loads((folder / "slam.json").read_text())
    (folder / "slam.json").write_text(json.dumps(settings | {"removed_layers": [1, 3]}))
    return folder


def _half_of_a_lora(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    torch.save(
        {"projector": with_theirs(projector), "lora": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}},
        file,
    )
    return file


def _of_another_llm(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    name = "base_model.model.model.layers.9.self_attn.q_proj"
    lora = {f"{name}.lora_A.default.weight": torch.ones(4, 16), f"{name}.lora_B.default.weight": torch.ones(16, 4)}
    torch.save({"projector": with_theirs(projector), "lora": lora}, file)
    return file


def _another_width(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    save_file({**projector, "up.weight": torch.ones(8, 32)}, file)
    return file


def _trained_encoder(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    names = {f"encoder_projector.{name}": tensor for name, tensor in with_theirs(projector).items()}
    torch.save({"model": {**names, "encoder.conv1.bias": torch.ones(16)}, "optimizer": {}}, file)
    return file


def _more_weights(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    torch.save({"projector": with_theirs(projector), "adapter": {"layers.0.weight": torch.ones(4)}}, file)
    return file


def _a_list_for_a_lora(exported: Path, file: Path) -> Path:
    torch.save(
        {"projector": with_theirs(load_file(exported / "lora" / "projector.safetensors")), "lora": [torch.ones(4)]}, file
    )
    return file


def _not_a_number(exported: Path, file: Path) -> Path:
    projector = load_file(exported / "lora" / "projector.safetensors")
    save_file({**projector, "up.bias": torch.full((16,), float("nan"))}, file)
    return file


def _code(exported: Path, file: Path) -> Path:
    torch.save({"projector": {"up": Path("x")}, "runs": print}, file)
    return file


def _cut(exported: Path, file: Path) -> Path:
    file.write_bytes((exported / "lora" / "projector.safetensors").read_bytes()[:200])
    return file


@pytest.mark.parametrize(
    ("make", "name", "line"),
    [
        (lambda exported, path: path, "nowhere.pt", r"there is no file or folder .*nowhere\.pt"),
        (_export_of_pruned, "pruned", r"must be of the unpruned encoder, got an export without its layers 1, 3"),
        (_half_of_a_lora, "half.pt", r"has one factor only of the LoRA on model\.layers\.0\.self_attn\.q_proj"),
        (_of_another_llm, "other.pt", r"its LoRA adapts model\.layers\.9\..* and the LLM has no such layer"),
        (_another_width, "wide.safetensors", r"the trained projector has tensors of another shape .*up\.weight: \(8, 32\)"),
        (_trained_encoder, "all.pt", r"weights that would not be read, 'encoder\.conv1\.bias' the first"),
        (_more_weights, "more.pt", r"weights that would not be read, 'adapter'"),
        (_a_list_for_a_lora, "list.pt", r"its lora must be a table of tensors, got list"),
        (_not_a_number, "nan.safetensors", r"weights must be finite numbers"),
        (_code, "code.pt", r"cannot be read as tensors \(a pickle's other content is never run\)"),
        (_cut, "cut.safetensors", r"cut\.safetensors"),
    ],
)
def test_weights_that_cannot_be_used_are_named_in_one_line(
    exported: Path, toy: Path, tmp_path: Path, make: Any, name: str, line: str
) -> None:
    weights = make(exported, tmp_path / name)
    with pytest.raises(StudyError, match=rf"anchor\.weights: .*{line}") as caught:
        TrainingContext.open(load_study(write_study(tmp_path / "s", toy, anchor={"weights": str(weights)})))
    assert len(caught.value.lines) == 1
