"""The study's unpruned system without weights, on the meta device: for counting parameters and operations beforehand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.record import Parameters

PROMPT_TOKENS = 6  # about what the default prompt takes; a tokenizer is not at hand where a plan is made


def encoder_layers(config: StudyConfig) -> int:
    """How many layers the unpruned encoder has."""
    from prunesearch.model.hub import architectures

    return int(architectures(config)[0].encoder_layers)


@dataclass(frozen=True)
class Skeleton:
    """The system without its weights, on the meta device."""

    encoder: Any  # WhisperEncoder
    projector: Any  # Projector
    llm: Any  # Llm, without a tokenizer


def skeleton(config: StudyConfig, dtype: Any = None) -> Skeleton:
    """The study's unpruned system; encoder and LLM in `dtype` (default: fp32)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from prunesearch.model.hub import architectures
    from prunesearch.model.llm import Llm
    from prunesearch.model.projector import Projector

    encoder_shape, llm_shape = architectures(config)
    with torch.device("meta"):
        encoder = WhisperEncoder(encoder_shape).to(dtype or torch.float32)
        model = AutoModelForCausalLM.from_config(llm_shape, dtype=dtype or torch.float32)
        widths = encoder_shape.d_model, model.get_input_embeddings().embedding_dim
        projector = Projector(*widths, config.projector.stack, config.projector.hidden, config.projector.dropout)
    model.requires_grad_(False)
    return Skeleton(encoder, projector, Llm(model, None, (), (0,) * PROMPT_TOKENS, 0, 0))


def params_of_candidates(config: StudyConfig) -> Callable[[Candidate], Parameters]:
    """Counts any candidate's parameters without training or even building it, from the architectures on the meta device."""
    from prunesearch.model.llm import lora
    from prunesearch.model.parameters import count_parameters

    frame = skeleton(config)
    with lora(frame.llm, 1, config.llm, seed=0) as adapted:
        whole = count_parameters(frame.encoder, frame.projector, adapted)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in frame.encoder.layers]

    def count(candidate: Candidate) -> Parameters:
        removed = sum(layers[i] for i in candidate.removed_layers)
        lora_params = whole.lora * candidate.lora_rank  # both of LoRA's factors grow with the rank
        return whole.model_copy(update={"encoder": whole.encoder - removed, "lora": lora_params})

    return count
