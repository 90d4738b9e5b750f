"""Digests of model weights: equal where the weights are, wherever and however they are stored."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperForConditionalGeneration

from prunesearch.model.checkpoint_files import weight_files
from prunesearch.model.digest import digest_of_source, hub_commit, model_digest, weights_digest
from prunesearch.model.encoder import ENCODER_PREFIX, load_encoder
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from tests.conftest import write_study


def cached_on_hub(folder: Path, cache: Path, name: str, commit: str) -> None:
    """Lay a model out as huggingface_hub's cache has it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_shards_and_a_single_file_have_the_same_digest(toy: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy / "llm")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    assert digest_of_source(tmp_path / "shards") == digest_of_source(toy / "llm")


def test_a_hub_model_has_the_digest_of_its_folder_and_a_commit(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached_on_hub(toy / "llm", tmp_path, "some/llm", commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert digest_of_source("some/llm") == digest_of_source(toy / "llm")
    assert hub_commit("some/llm") == hub_commit("some/llm", commit) == commit
    assert hub_commit("some/llm", "v2") is hub_commit("some/other") is hub_commit(toy / "llm") is None


def test_a_state_dict_has_the_digest_of_its_file(toy: Path, tmp_path: Path) -> None:
    state = load_encoder(toy / "encoder").state_dict()
    assert weights_digest(state) == digest_of_source(toy / "encoder")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    half |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    save_file(half, tmp_path / "model.safetensors")
    assert weights_digest(half) == digest_of_source(tmp_path)


@pytest.mark.parametrize("change", ["byte", "name", "shape", "dtype", "one more"])
def test_every_change_of_the_weights_changes_the_digest(toy: Path, tmp_path: Path, change: str) -> None:
    state = load_file(toy / "llm" / "model.safetensors")
    name = "model.norm.weight"
    if change == "byte":
        state[name].view(torch.uint8)[5] ^= 1
    elif change == "name":
        state["model.renamed.weight"] = state.pop(name)
    elif change == "shape":
        state[name] = state[name][None]
    elif change == "dtype":
        state[name] = state[name].view(torch.int32)
    else:
        state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    assert digest_of_source(tmp_path) != digest_of_source(toy / "llm")


def test_the_digest_of_a_full_whisper_checkpoint_covers_the_encoder_only(toy: Path, tmp_path: Path) -> None:
    encoder = load_encoder(toy / "encoder")
    whole = WhisperForConditionalGeneration(encoder.config)
    whole.model.encoder.load_state_dict(encoder.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    assert digest_of_source(tmp_path / "whole", prefix=ENCODER_PREFIX) == digest_of_source(
        toy / "encoder", prefix=ENCODER_PREFIX
    )
    assert digest_of_source(tmp_path / "whole") != digest_of_source(toy / "encoder")

    with torch.no_grad():
        whole.model.decoder.layer_norm.weight.add_(1)
    whole.save_pretrained(tmp_path / "other-decoder")
    config = load_study(write_study(tmp_path / "s", toy, encoder={"model": str(tmp_path / "other-decoder")}))
    assert model_digest(config, config.slam.encoder, ENCODER_PREFIX) == digest_of_source(toy / "encoder")
    assert model_digest(config, config.slam.llm) == digest_of_source(toy / "llm")

    with torch.no_grad():
        whole.model.encoder.layer_norm.weight.add_(1)
    whole.save_pretrained(tmp_path / "other-encoder")
    assert digest_of_source(tmp_path / "other-encoder", prefix=ENCODER_PREFIX) != digest_of_source(toy / "encoder")


def test_weights_that_are_missing_are_named(toy: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(toy / "llm").save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    lost = weight_files(tmp_path / "shards")[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        digest_of_source(tmp_path / "shards")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "pytorch_model.bin").touch()
    config = load_study(write_study(tmp_path / "s", toy, llm={"model": str(tmp_path / "none")}))
    with pytest.raises(StudyError, match=r"llm\.model: .*neither model\.safetensors nor") as caught:
        model_digest(config, config.slam.llm)
    assert len(caught.value.lines) == 1
