"""Decoder-only LLMs of other families than the toy's: each must do what the system needs of an LLM."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.model.llm import embedding_scale, load_llm, lora, lora_parameters, recompute_activations
from prunesearch.model.projector import Projector
from prunesearch.model.system import Target
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig, ProjectorConfig
from prunesearch.training.device import arithmetic, attention_for_training

SHAPE = {
    "vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "olmo2": {},
    "phi3": {"num_key_value_heads": 2},  # one projection for query, key and value
    "gemma2": {"head_dim": 16, "sliding_window": 8},  # soft-capped logits
    "gemma3_text": {  # scaled embeddings; heads too wide for some kernels
        "head_dim": 256, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "gpt_neox": {"num_key_value_heads": 2},  # other names for everything
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, toy: Path, tmp_path: Path) -> Path:
    """A model's folder, with the toy's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**SHAPE, **FAMILIES[request.param]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "llm").save_pretrained(tmp_path)
    return tmp_path


def built(folder: Path) -> SpeechLlm:
    llm = load_llm(folder, LlmConfig(model="llm"), torch.float32)
    torch.manual_seed(1)
    shape, width = ProjectorConfig(stack=2, hidden=16, dropout=0.0), llm.model.get_input_embeddings().embedding_dim
    return SpeechLlm(Projector.for_models(shape, 16, width, embedding_scale(llm.model)).eval(), llm, llm.model)


STATES, LENGTHS = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([40, 9, 23])
TEXTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
TARGETS = [Target(text) for text in TEXTS]


def test_padding_lora_and_generation_work_with_the_family(family: Path) -> None:
    slam = built(family)
    llm = slam.llm
    tokens = torch.tensor([t + [0] * (4 - len(t)) for t in TEXTS])
    with torch.no_grad():
        together = slam.logits(STATES, LENGTHS, tokens)
        for row, text in enumerate(TEXTS):
            audio, _ = slam.projector(STATES[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1])
            around = [llm.model.get_input_embeddings()(torch.tensor([list(ids)])) for ids in (llm.prompt, text)]
            plain = llm.model(inputs_embeds=torch.cat([audio, *around], 1)).logits[:, -len(text) - 1 : -1]
            torch.testing.assert_close(together[row : row + 1, : len(text)], plain, atol=2e-5, rtol=1e-4)

    with lora(llm.model, 2, LlmConfig(model="llm", lora_dropout=0.0), seed=0) as model:
        adapted = SpeechLlm(slam.projector, llm, model)
        torch.testing.assert_close(adapted.logits(STATES, LENGTHS, tokens), together)
        factors = lora_parameters(model)
        with torch.no_grad():
            for name, p in factors.items():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        adapted.loss(STATES, LENGTHS, TARGETS).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors.values())
        assert not any(p.grad is not None for name, p in model.named_parameters() if name not in factors)

    with torch.no_grad():
        assert torch.equal(slam.logits(STATES, LENGTHS, tokens), together)
        embeddings, mask = slam.prefix(STATES, LENGTHS)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        written = llm.model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
        for row in range(3):
            alone, its_mask = slam.prefix(STATES[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1])
            one = llm.model.generate(inputs_embeds=alone, attention_mask=its_mask, **settings)[0]
            assert written[row, : len(one)].tolist() == one.tolist()


def test_recomputed_activations_change_no_gradient(family: Path) -> None:
    gradients = []
    for recompute in (False, True):
        slam = built(family)
        if recompute:
            recompute_activations(slam.llm.model)
        with lora(slam.llm.model, 2, LlmConfig(model="llm", lora_dropout=0.0), seed=0) as model:
            model.train()
            SpeechLlm(slam.projector, slam.llm, model).loss(STATES, LENGTHS, TARGETS).backward()
            parameters = {**dict(slam.projector.named_parameters()), **lora_parameters(model)}
            gradients.append({name: p.grad for name, p in parameters.items()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_in_bf16_are_those_of_fp32_on_a_cpu(family: Path, device: str) -> None:
    """Padding is included: a kernel that computes masked rows differently would train a different model."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    gradients, losses = [], []
    for where, dtype in ((torch.device("cpu"), torch.float32), (torch.device(device), torch.bfloat16)):
        slam = built(family)
        slam.projector.to(where)
        slam.llm.model.to(where, dtype)
        with attention_for_training(where), arithmetic(where, dtype):
            loss = slam.loss(STATES.to(where), LENGTHS.to(where), TARGETS)
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.float().cpu().flatten() for p in slam.projector.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.1)


@pytest.mark.parametrize("missing", ["bos_token", "pad_token", "eos_token"])
def test_tokenizers_without_bos_or_pad_work(toy: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(toy / "llm", tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(toy / "llm")
    setattr(tokenizer, missing, None)
    tokenizer.save_pretrained(tmp_path)
    llm = load_llm(tmp_path, LlmConfig(model="llm"), torch.float32)
    assert llm.bos == ()
    assert llm.eos == 2  # where the tokenizer has none, the model's own
    assert llm.pad == (2 if missing == "pad_token" else 0)
    assert llm.tokens("low")[-1] == 2


def test_an_llm_without_an_end_of_sequence_token_is_refused(toy: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy / "llm")
    tokenizer.eos_token = None
    model = AutoModelForCausalLM.from_pretrained(toy / "llm")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path)
    with pytest.raises(StudyError, match="no end-of-sequence token"):
        load_llm(tmp_path, LlmConfig(model="llm"), torch.float32)
