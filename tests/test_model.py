"""The system under search against transformers' own, on random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel

from prunesearch.model.encoder import WhisperLayers, load_encoder, positions_of
from prunesearch.model.families.slam_asr import SlamSystem, SpeechLlm
from prunesearch.model.hub import architectures, name_without_path
from prunesearch.model.llm import Llm, embedding_scale, load_llm, lora, lora_parameters
from prunesearch.model.parameters import count_parameters
from prunesearch.model.projector import Projector
from prunesearch.model.surgery import remove_layers
from prunesearch.model.system import Target
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig, ProjectorConfig
from tests.conftest import LAYERS, write_study


@pytest.fixture(scope="module")
def encoder(toy: Path) -> WhisperEncoder:
    return load_encoder(toy / "encoder").eval()


@pytest.fixture
def slam(toy: Path, encoder: WhisperEncoder) -> SpeechLlm:
    llm = load_llm(toy / "llm", LlmConfig(model="llm"), torch.float32)
    torch.manual_seed(1)
    shape = ProjectorConfig(stack=2, hidden=16, dropout=0.0)
    projector = Projector.for_models(shape, encoder.config.d_model, 16, embedding_scale(llm.model)).eval()
    return SpeechLlm(projector, llm, llm.model)


def encode(encoder: WhisperEncoder, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return WhisperLayers(encoder, None).encode(features, frames)


def mels(count: int, frames: int) -> torch.Tensor:
    return torch.randn(count, 80, frames, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
def test_removing_nothing_at_full_length_is_whisper_bit_for_bit(encoder: WhisperEncoder) -> None:
    features = mels(2, 2 * encoder.max_source_positions)
    ours, lengths = encode(remove_layers(encoder, ()), features, torch.tensor([200, 200]))
    assert torch.equal(ours, encoder(features).last_hidden_state)
    assert lengths.tolist() == [100, 100]


@torch.no_grad()
def test_removing_layers_equals_deleting_them_by_hand(encoder: WhisperEncoder) -> None:
    features = mels(1, 200)
    by_hand = WhisperEncoder(WhisperConfig.from_dict(encoder.config.to_dict() | {"encoder_layers": 2})).eval()
    kept = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate((0, 3))}
    state = encoder.state_dict()
    mine = {k: v for k, v in state.items() if not k.startswith("layers.")}
    mine |= {k.replace(old, new): v for new, old in kept.items() for k, v in state.items() if k.startswith(old)}
    by_hand.load_state_dict(mine)
    pruned = remove_layers(encoder, (1, 2))
    assert torch.equal(encode(pruned, features, torch.tensor([200]))[0], by_hand(features).last_hidden_state)
    assert pruned.config.encoder_layers == 2
    assert pruned.state_dict().keys() == by_hand.state_dict().keys()


def test_removing_layers_lowers_the_count_by_exactly_their_sum(encoder: WhisperEncoder) -> None:
    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    removed = (0, 2)
    assert size(encoder) - size(remove_layers(encoder, removed)) == sum(size(encoder.layers[i]) for i in removed)
    assert len(encoder.layers) == LAYERS, "the original keeps its layers"


@pytest.mark.parametrize("outside", [LAYERS, -1, 99])
def test_layers_outside_the_encoder_are_refused(encoder: WhisperEncoder, outside: int) -> None:
    with pytest.raises(ValueError, match=rf"must lie in \[0, {LAYERS}\), got {outside}"):
        remove_layers(encoder, (outside,))


@torch.no_grad()
def test_the_encoder_of_a_whole_whisper_is_the_same_as_from_an_encoder_folder(tmp_path: Path, encoder: WhisperEncoder) -> None:
    whole = WhisperModel(encoder.config)
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path).state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in encoder.state_dict().items())


@torch.no_grad()
def test_a_pruned_encoder_opens_with_transformers_alone(tmp_path: Path, encoder: WhisperEncoder) -> None:
    pruned = remove_layers(encoder, (1,))
    pruned.save_pretrained(tmp_path)
    again = WhisperEncoder.from_pretrained(tmp_path).eval()
    features = mels(1, 200)
    assert torch.equal(again(features).last_hidden_state, encode(pruned, features, torch.tensor([200]))[0])


@torch.no_grad()
def test_padding_does_not_change_an_utterances_logits(encoder: WhisperEncoder, slam: SpeechLlm) -> None:
    frames = [81, 40, 120, 7]
    utterances = [mels(1, n) for n in frames]
    batch = torch.full((len(frames), 80, 160), 7.0)  # rubbish beyond the ends
    for row, m in zip(batch, utterances, strict=True):
        row[:, : m.shape[-1]] = m[0]
    texts = [[5, 6, 7], [8], [9, 10, 11, 12], [3, 4]]
    states, lengths = encode(encoder, batch, torch.tensor(frames))
    together = slam.logits(states, lengths, torch.tensor([t + [0] * (4 - len(t)) for t in texts]))
    for row, m, n, text in zip(together, utterances, frames, texts, strict=True):
        alone_states, alone_lengths = encode(encoder, m, torch.tensor([n]))
        assert alone_lengths.item() == alone_states.shape[1] == positions_of(torch.tensor(n)).item()
        alone = slam.logits(alone_states, alone_lengths, torch.tensor([text]))[0]
        torch.testing.assert_close(row[: len(text)], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_are_those_of_a_plain_forward_pass_at_the_text(encoder: WhisperEncoder, slam: SpeechLlm) -> None:
    states, lengths = encode(encoder, mels(1, 60), torch.tensor([60]))
    text = torch.tensor([[5, 6, 7, 2]])
    audio, _ = slam.projector(states, lengths)
    embed = slam.llm.model.get_input_embeddings()
    prompt = torch.tensor([slam.llm.prompt])
    everything = torch.cat([audio, embed(prompt), embed(text)], 1)
    plain = slam.llm.model(inputs_embeds=everything).logits[:, -5:-1]
    torch.testing.assert_close(slam.logits(states, lengths, text), plain, atol=1e-5, rtol=1e-4)
    assert slam.loss(states, lengths, [Target([5, 6, 7, 2])]).item() == pytest.approx(
        torch.nn.functional.cross_entropy(plain[0], text[0]).item(), rel=1e-4
    )


@torch.no_grad()
def test_a_fresh_lora_changes_nothing_and_leaves_nothing_behind(slam: SpeechLlm, encoder: WhisperEncoder) -> None:
    states, lengths = encode(encoder, mels(1, 60), torch.tensor([60]))
    text = torch.tensor([[5, 6]])
    before = slam.logits(states, lengths, text)
    names = list(slam.llm.model.state_dict())
    with lora(slam.llm.model, 4, LlmConfig(model="llm"), seed=0) as model:
        model.eval()
        adapted = SpeechLlm(slam.projector, slam.llm, model)
        assert torch.equal(adapted.logits(states, lengths, text), before)
        for p in lora_parameters(model).values():
            p.add_(0.1)
        assert not torch.allclose(adapted.logits(states, lengths, text), before)
    assert torch.equal(slam.logits(states, lengths, text), before)
    assert list(slam.llm.model.state_dict()) == names
    assert not any(p.requires_grad for p in slam.llm.model.parameters())


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_grows_with_its_rank_and_alpha_keeps_its_ratio(slam: SpeechLlm, rank: int) -> None:
    with lora(slam.llm.model, rank, LlmConfig(model="llm"), seed=0) as model:
        # q, o: 16 -> 16; k, v: 16 -> 8 (one key-value head of two); two layers
        assert sum(p.numel() for p in lora_parameters(model).values()) == 2 * rank * (2 * 32 + 2 * 24)
        assert model.peft_config["default"].lora_alpha == 2 * rank
        counts = count_parameters(torch.nn.Linear(2, 2), slam.projector, model)
        assert counts.llm == AutoModelForCausalLM.from_config(slam.llm.model.config).num_parameters()


def test_the_projector_starts_at_the_llms_own_scale(slam: SpeechLlm) -> None:
    scale = embedding_scale(slam.llm.model)
    with torch.no_grad():
        audio, lengths = slam.projector(torch.randn(4, 30, 16), torch.tensor([30, 29, 7, 1]))
    assert lengths.tolist() == [15, 15, 4, 1]
    assert audio[0].std().item() == pytest.approx(scale, rel=0.05)


def test_an_llm_whose_tokenizer_begins_with_bos_keeps_it(slam: SpeechLlm) -> None:
    plain = slam.llm
    with_bos = Llm(plain.model, plain.tokenizer, (1,), plain.prompt, plain.eos, plain.pad)
    states, lengths = torch.randn(2, 8, 16), torch.tensor([8, 3])
    without, _ = slam.prefix(states, lengths)
    begun, mask = SpeechLlm(slam.projector, with_bos, slam.model).prefix(states, lengths)
    assert begun.shape[1] == without.shape[1] + 1
    first = mask.argmax(1)
    embedding = plain.model.get_input_embeddings().weight[1]
    assert all(torch.equal(begun[row, first[row]], embedding) for row in range(2))


def test_a_model_that_is_not_there_raises_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")


def test_a_studys_models_are_loaded_frozen_and_as_they_are_stored(toy: Path, tmp_path: Path) -> None:
    models = SlamSystem.load(load_study(write_study(tmp_path, toy)), torch.float32)
    for module, name in ((models.encoder.module, "encoder"), (models.llm.model, "llm")):
        stored = load_file(toy / name / "model.safetensors")
        assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in stored.items())
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training
    assert models.encoder.extractor.feature_size == models.encoder.module.config.num_mel_bins


@pytest.mark.parametrize(("part", "lost"), [("encoder", "layers.1.fc1.weight"), ("llm", "model.layers.0.mlp.up_proj.weight")])
def test_a_checkpoint_without_one_of_its_tensors_is_refused(toy: Path, tmp_path: Path, part: str, lost: str) -> None:
    shutil.copytree(toy / part, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = load_study(write_study(tmp_path / "s", toy, **{part: {"model": str(tmp_path / "model")}}))
    with pytest.raises(StudyError, match=rf"{part}\.model: .*lacks 1 of .* the first is {lost}"):
        SlamSystem.load(config, torch.float32)


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_pickled_weights_are_not_read(toy: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(toy / part, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    config = load_study(write_study(tmp_path / "s", toy, **{part: {"model": str(tmp_path / "model")}}))
    with pytest.raises(StudyError, match=rf"{part}\.model: .*only pytorch_model\.bin, a pickle, .*safetensors") as caught:
        SlamSystem.load(config, torch.float32)
    assert len(caught.value.lines) == 1


def test_an_encoder_too_shallow_for_the_baselines_is_refused(toy: Path, tmp_path: Path) -> None:
    """A hub model's depth is known when its configuration is read, after the study file."""
    model = tmp_path / "model"
    remove_layers(load_encoder(toy / "encoder"), [3]).save_pretrained(model)
    config = load_study(write_study(tmp_path / "s", toy, encoder={"model": str(model)}, search={"max_removed": 1}))
    assert architectures(config)[0].encoder_layers == 3
    remove_layers(load_encoder(toy / "encoder"), [2, 3]).save_pretrained(model)
    with pytest.raises(StudyError, match=r"encoder\.model: must have at least three layers, got 2") as caught:
        architectures(config)
    assert len(caught.value.lines) == 1


def test_names_without_paths_reveal_nothing_about_the_machine(tmp_path: Path) -> None:
    assert name_without_path("openai/whisper-tiny") == "openai/whisper-tiny"
    assert name_without_path(str(tmp_path)) == name_without_path(f"{tmp_path}/") == tmp_path.name
    assert name_without_path("/of/another/machine/llm") == "llm"
    assert name_without_path("${MODELS}/llm") == name_without_path("../llm") == "llm"


# a model's own module: where a loader runs it, it leaves a file behind
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({ran!r}, "w").close()
class OwnTokenizer(PreTrainedTokenizerFast): ...
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): ...
"""
AUTO_MAPS: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}


def add_own_code(folder: Path, **needed: dict[str, str]) -> Path:
    """Give an LLM's folder code of its own, and configurations that name it. Returns the file that the code would write."""
    (folder / "own.py").write_text(OWN_CODE.format(ran=str(folder / "ran")))
    for name, auto_map in AUTO_MAPS.items():
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | {"auto_map": auto_map} | needed.get(name.split(".")[0], {})))
    return folder / "ran"


@pytest.mark.parametrize(
    "needed", [{"tokenizer_config": {"tokenizer_class": "OwnTokenizer"}}, {"config": {"model_type": "own"}}]
)
def test_a_model_that_needs_code_of_its_own_is_refused(toy: Path, tmp_path: Path, needed: dict[str, dict[str, str]]) -> None:
    shutil.copytree(toy / "llm", tmp_path / "llm")
    ran = add_own_code(tmp_path / "llm", **needed)
    config = load_study(write_study(tmp_path / "s", toy, llm={"model": str(tmp_path / "llm")}))
    with pytest.raises(StudyError, match=r"llm\.model: .* needs code of its own .*, which prunesearch never runs") as caught:
        SlamSystem.load(config, torch.float32)
    assert len(caught.value.lines) == 2
    assert not ran.exists()


def test_a_models_own_code_is_never_run(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "llm", tmp_path / "llm")
    ran = add_own_code(tmp_path / "llm")
    config = load_study(write_study(tmp_path / "s", toy, llm={"model": str(tmp_path / "llm")}))
    llm = SlamSystem.load(config, torch.float32).llm
    for part in (llm.tokenizer, llm.model):
        assert type(part).__module__.startswith("transformers.")
    assert not ran.exists()
