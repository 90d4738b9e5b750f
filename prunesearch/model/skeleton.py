"""The study's unpruned system without weights, on the meta device: for counting parameters and operations before training."""

from dataclasses import dataclass
from typing import Any

from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.record import Parameters

PROMPT_TOKENS = 6  # about the length of the default prompt: a plan is made without a tokenizer


def encoder_layers(config: StudyConfig) -> int:
    """Number of layers of the unpruned encoder. Raises StudyError where its configuration cannot be read."""
    from prunesearch.model.hub import architectures

    return int(architectures(config)[0].encoder_layers)


@dataclass(frozen=True)
class Skeleton:
    """The system without its weights, on the meta device."""

    encoder: Any  # WhisperEncoder
    projector: Any  # Projector
    llm: Any  # Llm, without a tokenizer


def skeleton(config: StudyConfig, dtype: Any = None) -> Skeleton:
    """Build the study's unpruned system on the meta device; encoder and LLM in `dtype` (default: fp32).

    Raises StudyError where a model's configuration cannot be read.
    """
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
        llm_width = model.get_input_embeddings().embedding_dim
        projector = Projector.for_models(config.projector, encoder_shape.d_model, llm_width)
    model.requires_grad_(False)
    return Skeleton(encoder, projector, Llm(model, None, (), (0,) * PROMPT_TOKENS, 0, 0))


@dataclass(frozen=True)
class ParameterCounter:
    """Counts a candidate's parameters without building it: a candidate lacks whole layers, and LoRA grows with its rank."""

    unpruned: Parameters  # with a LoRA of rank 1
    layer_sizes: tuple[int, ...]

    def __call__(self, candidate: Candidate) -> Parameters:
        removed = sum(self.layer_sizes[i] for i in candidate.removed_layers)
        lora = self.unpruned.lora * candidate.lora_rank
        return self.unpruned.model_copy(update={"encoder": self.unpruned.encoder - removed, "lora": lora})

    def of(self, objective: str, candidate: Candidate) -> int:
        """The candidate's count that `objective` names: see `Parameters.of`."""
        return self(candidate).of(objective)


def params_of_candidates(config: StudyConfig) -> ParameterCounter:
    """Make the function from a candidate to its parameter counts. Raises StudyError where a configuration cannot be read."""
    from prunesearch.model.llm import lora
    from prunesearch.model.parameters import count_parameters

    system = skeleton(config)
    with lora(system.llm, 1, config.llm, seed=0) as adapted:
        unpruned = count_parameters(system.encoder, system.projector, adapted)
    return ParameterCounter(unpruned, tuple(sum(p.numel() for p in layer.parameters()) for layer in system.encoder.layers))
