"""Model folders and exports that are damaged, incomplete or mixed up: refused in one line before anything is trained."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.models.whisper.modeling_whisper import (
    WhisperEncoder,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from prunesearch import SlamAsr
from prunesearch.commands.plan import plan
from prunesearch.model.checkpoint import require_finite
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.digest import sampled_digest
from prunesearch.model.encoder import load_encoder
from prunesearch.model.families.slam_asr import SlamSystem
from prunesearch.model.llm import load_llm
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig
from tests.conftest import write_study
from tests.fuzz import models as damaged
from tests.test_digest import cached_on_hub
from tests.test_launch import cli

# What the line must say, beside the part's name. Damage that is not listed must only be refused in one line.
SAYS = {
    ("encoder", "names begin with _orig_mod."): r"lacks 67 .*_orig_mod\.conv1\.bias.*torch\.compile",
    (
        "encoder",
        "config.json: 6 layers, weights of 4",
    ): r"lacks 30 .*layers\.4\..*\(6 layers in config\.json, 4 in the weights\)",
    (
        "encoder",
        "config.json: 3 layers, weights of 4",
    ): r"does not have \(15, .*layers\.3\..*3 layers in config\.json, 4 in the",
    ("encoder", "no layer_norm"): r"lacks 2 .*layer_norm\.bias",
    ("encoder", "config.json: max_source_positions 200"): r"embed_positions\.weight: \(100, 16\) where \(200, 16\)",
    ("encoder", "config.json: num_mel_bins 128"): r"conv1\.weight: \(16, 80, 3\) where \(16, 128, 3\)",
    ("encoder", "weights cut in half"): r"model\.safetensors is cut off: its header announces [\d,]+ bytes, it has [\d,]+",
    ("encoder", "weights empty"): r"model\.safetensors is empty",
    ("encoder", "weights are a git-lfs pointer"): r"git-lfs pointer.*git lfs pull",
    ("encoder", "weights pickled"): r"pytorch_model\.bin, a pickle, which is never read",
    ("encoder", "shard missing"): r"model-00002-of-00002\.safetensors is missing",
    ("encoder", "a NaN"): r"1 NaN or infinite of 32 values in layers\.2\.fc1\.bias",
    ("encoder", "a tensor of whole numbers"): r"got I8 for conv1\.bias",
    ("encoder", "a tensor under two names"): r"conv1\.bias and encoder\.conv1\.bias",
    ("encoder", "extractor of 128 mel bins"): r"feature_size .* must be 80, .*got 128",
    ("encoder", "extractor for 8 kHz"): r"sampling_rate .* must be 16000, .*got 8000",
    ("llm", "an adapter beside the weights"): r"adapter_config\.json: merge it into the weights",
    ("llm", "config.json: pad_token_id 280 of 280"): r"pad_token_id .*\[0, 280\).*got 280",
    ("llm", "eos_token_id 280 of 280"): r"end-of-sequence token's id must lie in \[0, 280\).*got 280",
    ("llm", "a token's id beyond the embedding"): r"embedding of 280, .*with id 100265",
    ("llm", "config.json: type bert"): r"must be a decoder-only language model, got one of type 'bert'",
    ("llm", "config.json: gptq"): r"quantised \(gptq\) and cannot be loaded here",
    ("llm", "a NaN"): r"model\.embed_tokens\.weight",
    ("export", "adapter missing"): r"adapter must hold the LoRA as adapter_model\.safetensors, since slam\.json says rank 2",
    ("export", "projector.safetensors missing"): r"has no projector\.safetensors",
    ("export", "llm missing"): r'local folder and is not part .*llm="/path/to/llm"',
    ("export", "projector.safetensors of another export"): r"different exports: projector\.safetensors",
    ("export", "adapter of another export"): r"different exports: adapter/",
    ("export", "llm of another export"): r"different exports: llm/",
    ("export", "encoder with a NaN"): r"conv2\.bias",
    ("export", "adapter with a NaN"): r"lora_A",
}
ALL = [(part, name) for part, damages in damaged.DAMAGES.items() for name in damages]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "intact"
    damaged.make_intact(folder)
    return folder


@pytest.mark.parametrize(("part", "name"), ALL)
def test_damage_is_named_in_one_line(intact: Path, tmp_path: Path, part: str, name: str) -> None:
    case = damaged.Case.copy(intact, tmp_path / "case")
    damaged.DAMAGES[part][name](case.folder / part)
    with pytest.raises(StudyError) as caught:
        case.load(part)
    (line,) = caught.value.lines
    assert "\n" not in line
    assert part in line or line.startswith("model.name: must be")
    assert re.search(SAYS.get((part, name), ""), line), line


def test_every_expected_line_is_about_a_listed_damage() -> None:
    assert set(ALL) >= SAYS.keys()


def test_random_damage_is_read_right_or_named() -> None:
    found = damaged.fuzz(seed=7, count=60)
    assert found.tried == 60
    assert found.wrong == []
    assert found.read > 0
    assert found.named > 0


@pytest.mark.parametrize(
    ("part", "name"), [("encoder", "names begin with _orig_mod."), ("llm", "a token's id beyond the embedding")]
)
def test_a_launch_is_refused_before_the_anchor_is_trained(intact: Path, tmp_path: Path, part: str, name: str) -> None:
    case = damaged.Case.copy(intact, tmp_path / "case")
    damaged.DAMAGES[part][name](case.folder / part)
    done = cli("launch", case.config.source)
    assert done.returncode == 2
    assert f"{part}.model: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "LOAD REPORT" not in done.stderr
    assert not list((case.folder / "study").glob("run/anchor/*"))


def test_a_plan_needs_no_weights(intact: Path, tmp_path: Path) -> None:
    case = damaged.Case.copy(intact, tmp_path / "case")
    with_weights = plan(case.config.source)
    for part in ("encoder", "llm"):
        (case.folder / part / "model.safetensors").unlink()
    assert plan(case.config.source) == with_weights


# What is expected to be there or not


@pytest.mark.parametrize("whole", [WhisperForConditionalGeneration, WhisperForAudioClassification])
def test_what_a_whisper_checkpoint_has_beside_its_encoder_is_expected(intact: Path, tmp_path: Path, whole: type) -> None:
    encoder = load_encoder(intact / "encoder")
    model = whole(encoder.config)
    (model.model if hasattr(model, "model") else model).encoder.load_state_dict(encoder.state_dict())
    model.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


def llm_folder(folder: Path, intact: Path, **shape: object) -> Path:
    """An LLM of another family with the toy's tokenizer."""
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "vocab_size": 280, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**{**settings, **shape})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(intact / "llm").save_pretrained(folder)
    return folder


def test_a_tied_output_layer_may_be_left_out_but_not_a_separate_one(intact: Path, tmp_path: Path) -> None:
    tied = llm_folder(tmp_path / "tied", intact, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    model = load_llm(tied, LlmConfig(model="tied"), torch.float32).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    damaged.of_json("config.json", tie_word_embeddings=False)(tied)
    with pytest.raises(CheckpointError, match=r"lacks 1 .*lm_head\.weight"):
        load_llm(tied, LlmConfig(model="tied"), torch.float32)


def test_shards_load_as_one_file_does(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "llm", tmp_path / "llm")
    damaged.in_shards()(tmp_path / "llm")
    state = load_llm(tmp_path / "llm", LlmConfig(model="llm"), torch.float32).model.state_dict()
    stored = load_file(intact / "llm" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_an_unused_special_token_may_lie_beyond_the_embedding(intact: Path, tmp_path: Path) -> None:
    """As the image token of Gemma 3's text models does. A token that a text can produce may not."""
    folder = tmp_path / "special"
    shutil.copytree(intact / "llm", folder)
    damaged.of_json("config.json", vocab_size=266)(folder)
    damaged.of_tensors(lambda t: {name: w[:266] if len(w) == 280 else w for name, w in t.items()})(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(load_llm(folder, LlmConfig(model="special"), torch.float32).tokenizer) == 267
    tokenizer.add_tokens(["ordinary"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"1 tokens without a row .* 'ordinary' with id 267"):
        load_llm(folder, LlmConfig(model="special"), torch.float32)


def test_weights_that_only_overflow_when_added_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    require_finite({"large": torch.full((4,), largest), "empty": torch.zeros(0, 3), "whole": torch.ones(2, dtype=torch.long)})
    half = torch.full((40_000,), 60_000.0, dtype=torch.float16)
    require_finite({"half": half})
    half[-1] = float("inf")
    with pytest.raises(CheckpointError, match="1 NaN or infinite of 40,000 values in half"):
        require_finite({"half": half})


def test_a_sampled_digest_tells_names_shapes_and_values_apart() -> None:
    state = {"a": torch.arange(100.0), "b": torch.ones(2, 3)}
    digest = sampled_digest(state)
    assert digest == sampled_digest(dict(reversed(state.items())))
    for other in (
        {"a": state["a"]},
        {**state, "b": torch.ones(3, 2)},
        {**state, "a": state["a"] + 1},
        {**state, "c": state["b"]},
    ):
        assert sampled_digest(other) != digest
    large = torch.zeros(1).expand(2**27 + 1)  # more values than fp32 can count
    assert sampled_digest({"a": large}) != sampled_digest({"a": large[:-1]})
    assert sampled_digest({"a": torch.zeros(0)}) != sampled_digest({"a": torch.zeros(0, 3)})


# Models of the hub, from its cache


@pytest.mark.parametrize("damage", ["a tensor of whole numbers", "weights cut in half", "an adapter beside the weights"])
def test_a_damaged_model_in_the_hubs_cache_is_named(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    case = damaged.Case.copy(intact, tmp_path / "case")
    damaged.ENCODER[damage](case.folder / "encoder")
    cached_on_hub(case.folder / "encoder", tmp_path / "cache", "some/encoder", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = load_study(write_study(tmp_path / "s", case.folder, encoder={"model": "some/encoder"}))
    with pytest.raises(StudyError, match=r"encoder\.model: some/encoder") as caught:
        SlamSystem.load(config, torch.float32)
    assert len(caught.value.lines) == 1


# Exports


def test_an_export_is_loaded_with_the_llm_it_was_trained_with_only(intact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    SlamAsr.from_pretrained(intact / "export").save_pretrained(out, with_llm=False)
    SlamAsr.from_pretrained(out, llm=intact / "llm")
    shutil.copytree(intact / "llm", tmp_path / "other")
    damaged.of_tensors(lambda t: {name: tensor * 2 for name, tensor in t.items()})(tmp_path / "other")
    with pytest.raises(StudyError, match="its LLM must have the weights that it was trained with, got others") as caught:
        SlamAsr.from_pretrained(out, llm=tmp_path / "other")
    assert len(caught.value.lines) == 1


def test_the_tokenizer_of_another_llm_is_refused(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "export", tmp_path / "out")
    file = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(stored))
    with pytest.raises(StudyError, match="different exports: tokenizer/"):
        SlamAsr.from_pretrained(tmp_path / "out")


def test_an_export_of_an_earlier_version_is_loaded(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact / "export", tmp_path / "out")
    damaged.of_json("slam.json", parts=...)(tmp_path / "out")
    assert "parts" not in json.loads((tmp_path / "out" / "slam.json").read_text())
    asr, new = SlamAsr.from_pretrained(tmp_path / "out"), SlamAsr.from_pretrained(intact / "export")
    assert sampled_digest(asr.reader.model.state_dict()) == sampled_digest(new.reader.model.state_dict())


@pytest.mark.parametrize("path", ["llm", "models/en/llm", "./llm", "/of/another/machine/llm"])
def test_a_path_in_an_export_of_the_first_format_is_never_a_hub_name(intact: Path, tmp_path: Path, path: str) -> None:
    out = tmp_path / "out"
    SlamAsr.from_pretrained(intact / "export").save_pretrained(out, with_llm=False)
    settings = json.loads((out / "slam.json").read_text())
    del settings["llm_is_local"]
    (out / "slam.json").write_text(json.dumps(settings | {"format": 1, "llm": settings["llm"] | {"model": path}}))
    with pytest.raises(StudyError, match=r'its LLM .*llm was a local folder .*llm="/path/to/.*llm"') as caught:
        SlamAsr.from_pretrained(out)
    assert len(caught.value.lines) == 1


def test_a_system_with_weights_that_are_no_numbers_is_not_saved(intact: Path, tmp_path: Path) -> None:
    asr = SlamAsr.from_pretrained(intact / "export")
    with torch.no_grad():
        asr.reader.projector.up.bias[0] = float("nan")
    with pytest.raises(StudyError, match=r"the exported system's projector: .*up\.bias"):
        asr.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_encoder_config_alone_does_not_load_an_encoder(tmp_path: Path, intact: Path) -> None:
    """A checkpoint of another kind whose names happen to exist in no encoder."""
    shutil.copytree(intact / "encoder", tmp_path / "encoder")
    save_file({"weight": torch.zeros(1)}, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    count = len(WhisperEncoder(load_encoder(intact / "encoder").config).state_dict())
    with pytest.raises(CheckpointError, match=rf"lacks {count} .*\(1, the first is weight\)"):
        load_encoder(tmp_path / "encoder")
