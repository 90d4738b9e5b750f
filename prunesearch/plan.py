"""What a study will run, before anything is run: parameters by group, the size of the space, steps. No weights are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunesearch.candidate import Candidate
from prunesearch.config import StudyConfig
from prunesearch.mistakes import StudyError
from prunesearch.record import Parameters
from prunesearch.search.space import SearchSpace


def _architectures(config: StudyConfig) -> tuple[Any, Any]:
    """The two models' configurations. Raises StudyError when one cannot be read."""
    from prunesearch.model.hub import read_architecture

    encoder, llm = read_architecture(config, config.encoder), read_architecture(config, config.llm)
    if not hasattr(encoder, "encoder_layers") or not hasattr(encoder, "num_mel_bins"):
        raise StudyError([f"encoder.model: must be a Whisper checkpoint, got one of type {encoder.model_type!r}"])
    return encoder, llm


def encoder_layers(config: StudyConfig) -> int:
    """How many layers the unpruned encoder has."""
    return int(_architectures(config)[0].encoder_layers)


def params_of_candidates(config: StudyConfig) -> Callable[[Candidate], Parameters]:
    """Counts any candidate's parameters without training or even building it, from the architectures on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from prunesearch.model.llm import Llm, lora
    from prunesearch.model.parameters import count_parameters
    from prunesearch.model.projector import Projector

    encoder_shape, llm_shape = _architectures(config)
    with torch.device("meta"):
        encoder, model = WhisperEncoder(encoder_shape), AutoModelForCausalLM.from_config(llm_shape)
        widths = encoder_shape.d_model, model.get_input_embeddings().embedding_dim
        projector = Projector(*widths, config.projector.stack, config.projector.hidden, config.projector.dropout)
        frame = Llm(model, None, (), (), 0, 0)
        with lora(frame, 1, config.llm, seed=0) as adapted:
            whole = count_parameters(encoder, projector, adapted)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in encoder.layers]

    def count(candidate: Candidate) -> Parameters:
        removed = sum(layers[i] for i in candidate.removed_layers)
        lora_params = whole.lora * candidate.lora_rank  # both of LoRA's factors grow with the rank
        return whole.model_copy(update={"encoder": whole.encoder - removed, "lora": lora_params})

    return count


@dataclass(frozen=True)
class Plan:
    """What will be run."""

    study: str
    encoder_layers: int
    layer_params: int
    named: dict[str, Parameters]
    candidates: int
    trials: int
    steps: int
    anchor_steps: int
    batch_size: int
    overrides: dict[str, tuple[Any, Any]]  # the preset's keys that the study has otherwise: preset's value, study's

    def reduction(self, name: str) -> dict[str, float]:
        """What a named system saves against `unpruned`, as fractions of encoder, speech side and whole system."""
        here, full = self.named[name], self.named["unpruned"]
        return {
            "encoder": 1 - here.encoder / full.encoder,
            "speech": 1 - here.speech / full.speech,
            "total": 1 - here.total / full.total,
        }

    def to_json(self) -> dict[str, Any]:
        named = {
            name: {**p.model_dump(), "speech": p.speech, "total": p.total, "reduction": self.reduction(name)}
            for name, p in self.named.items()
        }
        return {**{k: v for k, v in vars(self).items() if k != "named"}, "named": named}


def plan(config: StudyConfig) -> Plan:
    """Count everything that can be counted beforehand. Raises StudyError when a model's configuration cannot be read."""
    count = params_of_candidates(config)
    depth = encoder_layers(config)
    space = SearchSpace.of(config, depth)
    return Plan(
        study=config.name,
        encoder_layers=depth,
        layer_params=count(Candidate()).encoder - count(Candidate((depth - 1,))).encoder,
        named={name: count(candidate) for name, candidate in space.named.items()},
        candidates=space.size,
        trials=config.search.trials,
        steps=config.training.steps,
        anchor_steps=config.anchor.steps if config.training.init == "anchor" else 0,
        batch_size=config.training.batch_size,
        overrides=config.overrides(),
    )
