"""Assemble a study's candidate as a speech recogniser, from the study's models and the weights of the candidate's record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunesearch.asr.native import NativeAsr, NativeSettings
from prunesearch.asr.parts import Settings
from prunesearch.asr.recognizer import Recognizer
from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.model.encoder import WhisperLayers
from prunesearch.model.families import family_of
from prunesearch.model.families.slam_asr import SpeechLlm, trained_weights
from prunesearch.model.system import SpeechEncoder, SpeechSystem, TrainedSystem
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import ENCODER_FILE, TRAIN_AGAIN, WEIGHTS_FILE, RunRecord, record_folder
from prunesearch.training.finetune import restore, trainable
from prunesearch.training.tensors import read_tensors


@dataclass(frozen=True)
class StudyModels:
    """A study's models, loaded once for many candidates. The LLM is on `device`; the unpruned encoder stays on the CPU."""

    system: SpeechSystem
    dtype: str
    device: torch.device

    @classmethod
    def load(cls, config: StudyConfig, dtype: str) -> "StudyModels":
        """Load the models for the first GPU, else the CPU. Raises StudyError when one cannot be loaded."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        system = family_of(config).system().load(config, getattr(torch, dtype)).to(device)
        system.encoder.to("cpu")
        return cls(system, dtype, device)


def weights_file(config: StudyConfig, record: RunRecord) -> Path:
    """The file with a record's projector and LoRA; it may have been deleted."""
    return record_folder(config.run_folder / "records", record.candidate) / WEIGHTS_FILE


def require_weights(config: StudyConfig, record: RunRecord) -> None:
    """Raises StudyError where the record's weights are missing."""
    if not (file := weights_file(config, record)).exists():
        raise StudyError([f"{file} is missing: the weights of {record.candidate.key} were deleted, or are on another machine"])


def encoder_of(config: StudyConfig, record: RunRecord, unpruned: SpeechEncoder) -> SpeechEncoder:
    """The record's pruned encoder, with the maps that its repair refitted.

    Raises StudyError where these are not kept: `training.repair.keep_maps_of` makes them again.
    """
    encoder = unpruned.without(record.removed_layers)
    if record.repair is None or record.repair.method != "layers":
        return encoder
    file = record_folder(config.run_folder / "records", record.candidate) / ENCODER_FILE
    if not file.exists():
        raise StudyError([f"{file} is missing: the repaired encoder of {record.candidate.key} was not kept; export it again"])
    return encoder.with_maps(read_tensors(file, encoder.module.state_dict(), "delete it and export it again", complete=False))


def llm_differs(config: StudyConfig) -> bool:
    """Whether the LLM has other weights than where it came from: the anchor's LoRA was merged into it."""
    weights = trained_weights(config) if config.model is None else None
    return weights is not None and bool(weights.lora)


def recorded_dtype(record: RunRecord) -> str:
    """The dtype that the record's system was trained and decoded in."""
    return str(record.provenance.get("dtype", "float32"))


def load_candidate(config: StudyConfig, record: RunRecord, merge: bool | None = None) -> Recognizer:
    """Load the study's models and assemble the record's system.

    `merge` adds the LoRA to the language model's weights; by default, where the export is a folder of the family's own format,
    which would otherwise open without it. Raises StudyError where weights are missing or a model cannot be loaded.
    """
    require_weights(config, record)
    loaded = StudyModels.load(config, recorded_dtype(record))
    asr = assemble(config, record, loaded)
    merge = loaded.system.is_trained if merge is None else merge
    if merge and record.lora_rank > 0:
        asr.reader.model = asr.reader.model.merge_and_unload()
        asr.settings = asr.settings.model_copy(update={"merged": True})
    return asr


def assemble(config: StudyConfig, record: RunRecord, loaded: StudyModels) -> Recognizer:
    """The record's system on the device of the loaded models, whose LLM gets the record's LoRA: `loaded.system.detach` takes it
    off again. The pruned encoder shares its weights with the unpruned one and moves them to the device.
    """
    system = loaded.system
    encoder = encoder_of(config, record, system.encoder).to(loaded.device)
    reader = system.attach(system.new_projector(record.seed), record.lora_rank, record.seed)
    weights = trainable(reader)
    restore(weights, read_tensors(weights_file(config, record), weights, TRAIN_AGAIN))
    reader.projector.eval()
    reader.model.eval()
    if isinstance(system, TrainedSystem):
        assert config.model is not None
        native = NativeSettings.model_validate(
            {
                **_decoded_with(config, record, loaded.dtype),
                "model": config.model.model_copy(update={"name": config.locate(config.model.name)}),
            }
        )
        return NativeAsr.of(system, encoder, reader, native.without_paths(), loaded.device)
    assert isinstance(encoder, WhisperLayers)
    assert isinstance(reader, SpeechLlm)
    settings = Settings.model_validate(
        {
            **_decoded_with(config, record, loaded.dtype),
            "projector": config.slam.projector,
            "llm": config.slam.llm.model_copy(update={"model": config.locate(config.slam.llm.model)}),
            "pad_to_seconds": config.data.pad_to_seconds,
        }
    )
    return SlamAsr(encoder, reader, settings.without_paths(), loaded.device)


def _decoded_with(config: StudyConfig, record: RunRecord, dtype: str) -> dict[str, Any]:
    """What the settings of an export have in common."""
    return {
        "dtype": dtype,
        "removed_layers": record.removed_layers,
        "encoder_layers": record.encoder_layers,
        "shared_layers": config.shared_layers(record.encoder_layers),
        "lora_rank": record.lora_rank,
        "decoding": config.decoding,
        "text": config.text,
    }
