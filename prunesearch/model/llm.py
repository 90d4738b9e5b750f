"""A frozen causal LM and its tokenizer; LoRA put on it and taken off again."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from prunesearch.study.config import LlmConfig
from prunesearch.study.errors import StudyError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj")  # the published targets; the same, fused


@dataclass(frozen=True)
class Llm:
    """The model, and what is needed to talk to it. `bos` is empty where the tokenizer puts nothing before a text."""

    model: PreTrainedModel
    tokenizer: Any
    bos: tuple[int, ...]
    prompt: tuple[int, ...]
    eos: int
    pad: int

    def tokens(self, text: str) -> list[int]:
        """The text's tokens and the end of sequence: what the LLM is taught to write."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.eos]


def load_llm(source: str | Path, config: LlmConfig, dtype: torch.dtype, tokenizer_source: str | Path | None = None) -> Llm:
    """Load from a folder or the hub; safetensors only, no remote code. A tokenizer may lie elsewhere.

    Raises OSError when there is no such model, StudyError when it cannot be quantised or knows no end of sequence.
    """
    revision = config.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source or source, revision=None if tokenizer_source else revision)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        revision=config.revision or "main",
        dtype=dtype,
        use_safetensors=True,
        quantization_config=_quantization(config, dtype),
    )
    model.requires_grad_(False).eval()
    # The states whose logits are wanted come as a slice. A matrix product with a sliced (B, S, D) cannot be folded to two
    # dimensions: torch would copy the vocabulary's matrix once per utterance (20 of 30 s of a step with 262 k entries).
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    own = [i for i in (tokenizer.eos_token_id, model.config.eos_token_id) if i is not None]
    if not own:
        raise StudyError([f"llm.model: {source} has no end of sequence: set eos_token in its tokenizer_config.json"])
    eos = own[0] if isinstance(own[0], int) else own[0][0]
    return Llm(
        model=model,
        tokenizer=tokenizer,
        bos=tuple(t for t in tokenizer("").input_ids if t == tokenizer.bos_token_id),
        prompt=tuple(tokenizer(config.prompt, add_special_tokens=False).input_ids),
        eos=eos,
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
    )


def _quantization(config: LlmConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if config.quantization is None:
        return None
    if not torch.cuda.is_available():
        raise StudyError([f"llm.quantization: {config.quantization!r} needs a GPU, and there is none; leave the key out"])
    if find_spec("bitsandbytes") is None:
        raise StudyError(["llm.quantization: bitsandbytes is not installed: pip install 'prunesearch[quantized]'"])
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def recompute_activations(model: PreTrainedModel) -> None:
    """From now on, the backward pass computes a layer's activations again instead of keeping them."""
    # transformers is about to drop the second name, and has not always had the first
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether it does already."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def embedding_scale(model: PreTrainedModel) -> float:
    """Standard deviation of what the LLM's embedding layer puts out, over (at most) 4,096 tokens of the vocabulary."""
    embedding = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, min(vocabulary, 4096), device=embedding.weight.device).long()
    with torch.no_grad():
        scale: Tensor = embedding(ids).float().std()
    return float(scale)


def lora_targets(model: PreTrainedModel, config: LlmConfig) -> list[str]:
    """Names of the layers that LoRA adapts. Raises StudyError when the model has no layer of a name."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    kind = model.config.model_type
    if config.lora_targets == "auto":
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
        targets = next((own for own in ATTENTION if names.issuperset(own)), known)
        if not targets:
            raise StudyError(
                [f"llm.lora_targets: nothing is known of {kind!r} models; name some of its layers: {_layers(model)}"]
            )
        return list(targets)
    if missing := [t for t in config.lora_targets if t not in names]:
        raise StudyError([f"llm.lora_targets: this {kind!r} model has no layer {missing[0]!r}; it has {_layers(model)}"])
    return list(config.lora_targets)


def _layers(model: PreTrainedModel) -> str:
    """The names of the layers within one of the model's blocks."""
    blocks = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if any(True for _ in m.parameters(False)) and ".0." in n}
    return ", ".join(sorted(blocks))


@contextmanager
def lora(llm: Llm, rank: int, config: LlmConfig, seed: int) -> Iterator[Any]:
    """The model with a fresh LoRA of the rank (the bare model for rank 0); taken off at the end.

    alpha / rank is constant, as in the published work, so that a rank changes capacity and not the size of the step.
    """
    if rank == 0:
        yield llm.model
        return
    adapted = with_lora(llm, rank, config, seed)
    try:
        yield adapted
    finally:
        adapted.unload()
        if hasattr(llm.model, "peft_config"):
            del llm.model.peft_config


def with_lora(llm: Llm, rank: int, config: LlmConfig, seed: int) -> Any:
    """The model with a fresh LoRA of the rank, for good; the bare model for rank 0."""
    if rank == 0:
        return llm.model
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank * config.lora_alpha_per_rank,  # peft divides by the rank
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(llm.model, config),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it by its old name
        return get_peft_model(llm.model, settings)


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name; empty without LoRA."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def pad_tokens(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """(B, S), padded on the right."""
    width = max(map(len, sequences))
    return sent_to(device, torch.tensor([[*s, *[value] * (width - len(s))] for s in sequences]))


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device. A GPU gets it in its own time: the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
