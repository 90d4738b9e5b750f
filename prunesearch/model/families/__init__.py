"""The families of speech models: one file each in this folder, and one row each in this table.

Nothing here imports torch: a family's file is imported when a system is built.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesearch.model.hub import architectures, known_architecture, read_architecture
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LEAST_ENCODER_LAYERS

if TYPE_CHECKING:
    from prunesearch.model.system import SpeechSystem, TrainedSystem


@dataclass(frozen=True)
class Family:
    """A row of the table. `file`: the module in this folder, which has a subclass of `SpeechSystem` as `System`.

    `is_trained`: its models transcribe already, so that no anchor is trained. `depth`: where the configuration of a model
    tells how many layers its encoder has, such as `audio_config.encoder_layers`.
    """

    file: str
    is_trained: bool
    depth: str

    def system(self) -> "type[SpeechSystem]":
        system: type[SpeechSystem] = import_module(f"{__name__}.{self.file}").System
        return system

    def trained_system(self) -> "type[TrainedSystem]":
        """The system of a family whose models transcribe already."""
        assert self.is_trained
        return self.system()  # type: ignore[return-value]

    def layers(self, shape: Any) -> int:
        """The encoder's depth in a model's configuration."""
        for name in self.depth.split("."):
            shape = getattr(shape, name)
        return int(shape)


SLAM_ASR = Family("slam_asr", is_trained=False, depth="encoder_layers")
FAMILIES = {  # by the model_type of a configuration
    "whisper": Family("whisper", is_trained=True, depth="encoder_layers"),
    "audioflamingo3": Family("audio_tower", is_trained=True, depth="audio_config.num_hidden_layers"),
    "glmasr": Family("audio_tower", is_trained=True, depth="audio_config.num_hidden_layers"),
    "moss_transcribe_diarize": Family("audio_tower", is_trained=True, depth="audio_config.num_hidden_layers"),
    "qwen2_audio": Family("audio_tower", is_trained=True, depth="audio_config.encoder_layers"),
    "qwen3_asr": Family("audio_tower", is_trained=True, depth="audio_config.encoder_layers"),
    "voxtral": Family("audio_tower", is_trained=True, depth="audio_config.num_hidden_layers"),
}
_CTC = "its encoder feeds CTC predictions back behind its middle layer, and removing a layer would move that place"
_INSIDE = "its projector is a part of its audio tower"
_NO_LAYERS = "its audio goes through a codec, and not through an encoder"
REFUSED = {  # known, but not made for removing layers
    "granite_speech": _CTC,
    "granite_speech_plus": _CTC,
    "kyutai_speech_to_text": _NO_LAYERS,
    "qwen2_5_omni": _INSIDE,
    "qwen2_5_omni_thinker": _INSIDE,
    "qwen3_omni_moe": _INSIDE,
    "qwen3_omni_moe_thinker": _INSIDE,
    "vibevoice_asr": _NO_LAYERS,
}


def family_of(config: StudyConfig) -> Family:
    """The family of the study's models.

    Raises StudyError for a model that cannot be read, is of no known family, or whose encoder is too shallow for the baselines.
    """
    if config.model is None:
        return SLAM_ASR
    shape = read_architecture(config, config.model)
    if (reason := REFUSED.get(shape.model_type)) is not None:
        fix = f"take one of {', '.join(sorted(FAMILIES))}"
        raise StudyError([f"model.name: no layers can be removed from a model of type {shape.model_type!r}: {reason}; {fix}"])
    if (family := FAMILIES.get(shape.model_type)) is None:
        known = ", ".join(sorted(FAMILIES))
        raise StudyError(
            [
                f"model.name: must be a speech model of a known family ({known}), got one of type {shape.model_type!r}: "
                "a text model goes to [llm], behind an [encoder]"
            ]
        )
    if (layers := family.layers(shape)) < LEAST_ENCODER_LAYERS:
        raise StudyError(
            [
                f"model.name: its encoder must have at least three layers, got {layers}: "
                "the baseline top2 removes two, and one must stay"
            ]
        )
    return family


def describe_model(config: StudyConfig) -> str:
    """The family of the study's model, and its encoder's depth; of a model on the hub, only its name.

    Raises StudyError where a model on this machine is of no known family.
    """
    if config.model is None:
        return "SLAM-ASR"
    name = config.locate(config.model.name)
    if not Path(name).exists() and known_architecture(name) is None:
        return f"{config.model.name} from the hub"
    return f"{read_architecture(config, config.model).model_type} with {encoder_layers(config)} encoder layers"


def encoder_layers(config: StudyConfig) -> int:
    """Number of layers of the unpruned encoder. Raises StudyError where a model's configuration cannot be read."""
    family = family_of(config)
    shape = architectures(config)[0] if config.model is None else read_architecture(config, config.model)
    return family.layers(shape)
