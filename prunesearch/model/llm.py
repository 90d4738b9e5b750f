"""A frozen causal LM and its tokenizer, and LoRA on it.

Shapes: B batch, S tokens, D width.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from prunesearch.model.checkpoint import Part, library_errors, load_checkpoint, read_config
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.hub import unusable_llm
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig, ModelConfig

# LoRA's targets in the published work (arXiv 2603.27981), and the same layers where query, key and value are one projection
LLM = Part("model")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj")


@dataclass(frozen=True)
class Llm:
    """The model, its tokenizer, and token ids. `bos` is empty if the tokenizer puts nothing before a text."""

    model: PreTrainedModel
    tokenizer: Any
    bos: tuple[int, ...]
    prompt: tuple[int, ...]
    eos: int
    pad: int
    quantized: bool = False

    def tokens(self, text: str) -> list[int]:
        """The text's tokens and the end of sequence: the LLM's training target. A special token written in the text, such as
        `</s>`, is text like any other."""
        return [*self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids, self.eos]

    def to(self, device: torch.device) -> "Llm":
        """Move the model to the device, in place. A quantised model stays where bitsandbytes has placed it."""
        if not self.quantized:
            self.model.to(device)
        return self


def load_llm(source: str | Path, config: LlmConfig, dtype: torch.dtype, tokenizer_source: str | Path | None = None) -> Llm:
    """Load model and tokenizer from a folder or the hub: safetensors only, and no code that comes with a model is run.

    `tokenizer_source`: the tokenizer's folder, where it is not the model's. Raises OSError or ValueError when there is no such
    model, CheckpointError when it is not whole or not the model of its configuration, StudyError when it cannot be quantised or
    has no end-of-sequence token.
    """
    shape = read_config(source, config.revision)
    if problem := unusable_llm(shape):
        raise CheckpointError(problem)
    tokenizer = _load_tokenizer(tokenizer_source or source, None if tokenizer_source else config.revision)
    quantization = _quantization(config, dtype)
    stored = getattr(shape, "quantization_config", None)
    try:
        model = load_checkpoint(
            AutoModelForCausalLM, source, config.revision, shape, LLM, dtype=dtype, quantization_config=quantization
        )
    except CheckpointError as error:
        if stored is None:
            raise
        raise CheckpointError(
            f"its weights are quantised ({dict(stored).get('quant_method')}) and cannot be loaded here: {error}; "
            "use the model before its quantisation, and llm.quantization"
        ) from error
    model.requires_grad_(False).eval()
    # The states whose logits are needed come as a slice. A matrix product with a sliced (B, S, D) cannot be folded to two
    # dimensions: torch would copy the vocabulary's matrix once per utterance (20 of 30 s of a step with 262 k entries).
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    ends = [i for i in (tokenizer.eos_token_id, model.config.eos_token_id) if i is not None]
    if not ends:
        raise StudyError([f"llm.model: {source} has no end-of-sequence token: set eos_token in its tokenizer_config.json"])
    eos = ends[0] if isinstance(ends[0], int) else ends[0][0]
    llm = Llm(
        model=model,
        tokenizer=tokenizer,
        bos=tuple(t for t in tokenizer("").input_ids if t == tokenizer.bos_token_id),
        prompt=tuple(tokenizer(config.prompt, add_special_tokens=False).input_ids),
        eos=eos,
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
        quantized=config.quantization is not None,
    )
    _require_embeddings(llm)
    return llm


def _load_tokenizer(source: str | Path, revision: str | None) -> Any:
    """The tokenizer beside a model. Raises CheckpointError when its files are damaged or missing."""
    with library_errors("its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded", local=Path(source).is_dir()):
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)


def _require_embeddings(llm: Llm) -> None:
    """Raises CheckpointError where a token of the tokenizer has no row in the model's embedding.

    Special tokens that are never used are not counted: Gemma 3's tokenizer has one for images, its text models none.
    """
    rows = llm.model.get_input_embeddings().weight.shape[0]
    ids = {"end-of-sequence": [llm.eos], "padding": [llm.pad], "prompt": [*llm.bos, *llm.prompt]}
    for what, used in ids.items():
        if outside := [i for i in used if not 0 <= i < rows]:
            raise CheckpointError(
                f"the {what} token's id must lie in [0, {rows}), the model's embedding, got {outside[0]}: "
                "tokenizer and model must be of the same checkpoint"
            )
    special = {i for i, token in llm.tokenizer.added_tokens_decoder.items() if token.special}
    rowless = {i: token for token, i in llm.tokenizer.get_vocab().items() if i >= rows and i not in special}
    if rowless:
        i, token = min(rowless.items())
        raise CheckpointError(
            f"the tokenizer has {len(rowless)} tokens without a row in the model's embedding of {rows}, the first is {token!r} "
            f"with id {i}: tokenizer and model must be of the same checkpoint (or resize_token_embeddings was not saved)"
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
    """Turn on gradient checkpointing: the backward pass computes a layer's activations again instead of keeping them."""
    # transformers deprecates the second name, and its older versions lack the first
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def embedding_scale(model: PreTrainedModel) -> float:
    """Standard deviation of the LLM's input embeddings, over at most 4,096 tokens spread evenly over the vocabulary."""
    embedding = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = torch.linspace(0, vocabulary - 1, min(vocabulary, 4096), device=embedding.weight.device).long()
    with torch.no_grad():
        scale: Tensor = embedding(ids).float().std()
    return float(scale)


def lora_targets(model: PreTrainedModel, config: LlmConfig | ModelConfig) -> list[str]:
    """Names of the layers that LoRA adapts. Raises StudyError when the model has no layer of that name."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    kind, key = model.config.model_type, f"{'model' if isinstance(config, ModelConfig) else 'llm'}.lora_targets"
    if config.lora_targets == "auto":
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
        targets = next((own for own in ATTENTION if names.issuperset(own)), known)
        if not targets:
            raise StudyError([f'{key}: "auto" has no default for {kind!r} models; name some of its layers: {_layers(model)}'])
        return list(targets)
    if missing := [t for t in config.lora_targets if t not in names]:
        raise StudyError([f"{key}: this {kind!r} model has no layer {missing[0]!r}; it has {_layers(model)}"])
    return list(config.lora_targets)


def _layers(model: PreTrainedModel) -> str:
    """The names of the layers within one of the model's blocks."""
    blocks = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if any(True for _ in m.parameters(False)) and ".0." in n}
    return ", ".join(sorted(blocks))


@contextmanager
def lora(model: PreTrainedModel, rank: int, config: LlmConfig | ModelConfig, seed: int) -> Iterator[Any]:
    """The model with a new LoRA of this rank (rank 0: the model itself), which is removed when the context ends.

    alpha / rank is constant, as in the published work, so that the rank changes capacity but not the size of a step.
    `seed` sets torch's global random generator, from which the LoRA's first factors are drawn.
    """
    if rank == 0:
        yield model
        return
    adapted = with_lora(model, rank, config, seed)
    try:
        yield adapted
    finally:
        remove_lora(adapted, model)


def remove_lora(adapted: Any, model: PreTrainedModel) -> None:
    """Undo `with_lora`: afterwards, the model is as it was before."""
    if adapted is not model:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def with_lora(
    model: PreTrainedModel, rank: int, config: LlmConfig | ModelConfig, seed: int, targets: list[str] | str | None = None
) -> Any:
    """Put a new LoRA of this rank on the model, and leave it there. Rank 0: the model itself. See `lora`.

    `targets`: names of linear layers, or a regular expression for their full names; default: `lora_targets`, of a causal LM.
    """
    if rank == 0:
        return model
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank * config.lora_alpha_per_rank,  # peft divides by the rank
        lora_dropout=config.lora_dropout,
        target_modules=targets or lora_targets(model, config),
        task_type="CAUSAL_LM" if targets is None else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses transformers' old name
        return get_peft_model(model, settings)


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The LoRA's parameters by name; empty without LoRA."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def state_without_lora(model: Any) -> dict[str, Tensor]:
    """The model's tensors without its LoRA, under the names that transformers gives them."""
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    # peft has put its layers around the model's own
    return {name.replace(".base_layer", ""): tensor for name, tensor in own.state_dict().items() if ".lora_" not in name}


def save_without_lora(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in this precision as transformers would, without its LoRA."""
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in state_without_lora(model).items()})


def pad_tokens(sequences: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Token ids (B, S), padded on the right with `value`."""
    width = max(map(len, sequences))
    return sent_to(device, torch.tensor([[*s, *[value] * (width - len(s))] for s in sequences]))


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy the tensor to the device. To a GPU, the copy is asynchronous: the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
