"""The sections of a study file that name models: a speech model that exists already, or the parts of a SLAM-ASR system."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from prunesearch.study.section import Count, Fraction, ModelSource, Positive, Section, context_of

LEAST_ENCODER_LAYERS = 3  # the baseline `top2` removes two, and one must stay


def check_depth(value: str, info: ValidationInfo) -> str:
    """Return the model's name. Raises ValueError if its encoder is known to be too shallow for the baselines."""
    depth = context_of(info, "encoder_layers")
    if depth is not None and depth < LEAST_ENCODER_LAYERS:
        raise ValueError(
            f"must have at least three layers, got {depth}: the baseline top2 removes two, and one must stay; "
            "choose a deeper encoder"
        )
    return value


class EncoderConfig(Section):
    """A Whisper checkpoint: a folder (relative to the study file, `${VARIABLES}` expanded) or a hub name."""

    model: ModelSource
    revision: str | None = None

    _check_depth = field_validator("model")(check_depth)

    @property
    def source(self) -> str:
        return self.model


class LlmConfig(Section):
    """Any decoder-only causal LM: a folder or a hub name. LoRA's alpha is `lora_alpha_per_rank` times its rank.

    `lora_targets` are names of linear layers. `auto` means the q, k, v and o projections if the model uses these names,
    else peft's own choice.
    """

    model: ModelSource
    revision: str | None = None
    prompt: str = "Transcribe speech to text.\n"
    lora_targets: tuple[str, ...] | Literal["auto"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="with bitsandbytes, on a GPU")
    lora_alpha_per_rank: Positive = 2.0
    lora_dropout: Fraction = 0.1

    @property
    def source(self) -> str:
        return self.model


class ProjectorConfig(Section):
    """Concatenates `stack` encoder positions, then applies Linear, ReLU, dropout, Linear, LayerNorm."""

    stack: Count = 5
    hidden: Count = 2048
    dropout: Fraction = 0.1


class ModelConfig(Section):
    """A speech model that transcribes already: a folder or a hub name. No anchor is trained.

    `lora_targets` are names of linear layers of its language model (of Whisper: its decoder). `auto` means the projections of
    its attention.
    """

    name: ModelSource
    revision: str | None = None
    language: str | None = Field(None, description="spoken in recordings whose data names none, such as da")
    window_seconds: Count | None = Field(
        None, description="shorten the encoder's window, for data whose recordings are all shorter; default: the model's own"
    )
    lora_targets: tuple[str, ...] | Literal["auto"] = "auto"
    lora_alpha_per_rank: Positive = 2.0
    lora_dropout: Fraction = 0.1

    _check_depth = field_validator("name")(check_depth)

    @property
    def source(self) -> str:
        return self.name


@dataclass(frozen=True)
class SlamParts:
    """What a SLAM-ASR system is assembled from."""

    encoder: EncoderConfig
    llm: LlmConfig
    projector: ProjectorConfig


ModelSection: TypeAlias = EncoderConfig | LlmConfig | ModelConfig
KEYS: dict[type[Section], str] = {EncoderConfig: "encoder.model", LlmConfig: "llm.model", ModelConfig: "model.name"}
"""The key of a study file that names a section's model."""
