"""An exported speech model in its family's own format: a folder that transformers opens without this package.

Beside the model's own files lies `prunesearch.json`: what the study decoded with. A folder without it, such as a checkpoint
from the hub, works too, with default settings. A LoRA that is not merged lies in `adapter/`, in peft's format.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from prunesearch.asr.parts import load_adapter, local_folder, save_adapter
from prunesearch.asr.recognizer import Recognizer
from prunesearch.model.checkpoint import read_config
from prunesearch.model.families import FAMILIES, Family
from prunesearch.model.hub import explain_loading, is_local, name_without_path
from prunesearch.model.llm import lora_parameters
from prunesearch.model.system import Reader, SpeechEncoder, TrainedSystem
from prunesearch.study.config import DecodingConfig, TextConfig
from prunesearch.study.errors import StudyError, describe_validation_error
from prunesearch.study.files import write_atomically
from prunesearch.study.model_config import ModelConfig
from prunesearch.training.device import pick_dtype

SETTINGS = "prunesearch.json"


class NativeSettings(BaseModel):
    """What a study's candidate was decoded with: the content of `prunesearch.json`. `model`: the model that was pruned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    dtype: Literal["float32", "bfloat16"]  # of all computations
    model: ModelConfig
    removed_layers: tuple[int, ...] = ()
    encoder_layers: int | None = None  # of the unpruned encoder; None in a checkpoint that no study exported
    shared_layers: int = 0  # number of first layers that all of the study's candidates have
    lora_rank: int = 0
    merged: bool = False  # whether the LoRA is merged into the model's weights
    decoding: DecodingConfig = DecodingConfig()
    text: TextConfig = TextConfig()

    @property
    def pad_to_seconds(self) -> None:
        """The family's own feature extractor pads."""

    def without_paths(self) -> Self:
        """The same for another machine: of a model in a local folder, only the folder's base name."""
        named = self.model.name if not is_local(self.model.name) else name_without_path(self.model.name)
        return self.model_copy(update={"model": self.model.model_copy(update={"name": named})})


class NativeAsr(Recognizer):
    """A speech model of a family that transformers knows, with layers of its encoder removed."""

    settings: NativeSettings
    system: TrainedSystem

    @classmethod
    def of(
        cls,
        system: TrainedSystem,
        encoder: SpeechEncoder,
        reader: Reader,
        settings: NativeSettings,
        device: torch.device,
    ) -> Self:
        asr = cls(encoder, reader, settings, device)
        asr.system = system
        return asr

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, device: str | torch.device | None = None) -> Self:
        """Load a folder that `prunesearch export` wrote, or any folder or hub repository of a family that is known.

        `device`: default is the first GPU, else the CPU. Only safetensors are read, and no code that comes with a model is
        run. Raises StudyError when there is no such model, or a part of it is missing or cannot be loaded.
        """
        folder = local_folder(source, revision)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings = _read_settings(folder, source, where)
        family = _family(folder, source)
        own = settings.model.model_copy(update={"name": str(folder), "revision": None, "window_seconds": None})
        try:
            system = family.trained_system().from_source(str(folder), own, getattr(torch, settings.dtype)).to(where)
        except StudyError:
            raise
        except (OSError, ValueError) as error:
            raise StudyError(explain_loading(str(source), revision, error)) from error
        if settings.encoder_layers is not None:
            depth = settings.encoder_layers - len(settings.removed_layers)
            if system.encoder.depth != depth:
                rule = f"its encoder must have {depth} layers, as {SETTINGS} says, got {system.encoder.depth}"
                raise StudyError([f"{source}: {rule}: export it again"])
        reader = system.attach(system.new_projector(0))
        if settings.lora_rank and not settings.merged:
            reader.model = load_adapter(system.model, folder / "adapter", settings.lora_rank, own.lora_alpha_per_rank, SETTINGS)
        reader.projector.eval()
        reader.model.eval()
        return cls.of(system, system.encoder, reader, settings.without_paths(), where)

    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the model in its family's own format, and the settings beside it. `with_llm` changes nothing: it is whole."""
        self._require_finite()
        folder, settings = Path(folder), self.settings.without_paths()
        folder.mkdir(parents=True, exist_ok=True)
        self.system.save_pretrained(folder, self.encoder, self.reader)
        if settings.lora_rank and not settings.merged:
            save_adapter(self.reader.model, folder / "adapter", settings.model.name)
        write_atomically(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")

    def _states(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        states = {"encoder": self.encoder.module.state_dict(), "decoder": self.reader.base.state_dict()}
        adapter: dict[str, Any] = lora_parameters(self.reader.model)
        return {**states, "adapter": adapter} if adapter else states


def _read_settings(folder: Path, source: str | Path, device: torch.device) -> NativeSettings:
    """The content of `prunesearch.json`, or default settings where there is none. Raises StudyError where it is damaged."""
    file = folder / SETTINGS
    if not file.is_file():
        dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
        return NativeSettings.model_validate({"dtype": dtype, "model": ModelConfig(name=str(source))})
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return NativeSettings.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = describe_validation_error(error, raw, NativeSettings)
        raise StudyError([f"{file} is not as this version writes it: {line}" for line in lines]) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise StudyError([f"{file} is damaged ({error}): copy or export it again"]) from None


def _family(folder: Path, source: str | Path) -> Family:
    """The family of a folder's model. Raises StudyError for a folder without a model, or of a family that is not known."""
    try:
        kind = read_config(folder, None).model_type
    except (OSError, ValueError) as error:
        raise StudyError(explain_loading(str(source), None, error)) from error
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise StudyError(
            [f"{source}: must be an export or a speech model of a known family ({known}), got one of type {kind!r}"]
        )
    return FAMILIES[kind]
