"""Assemble a study's candidate as a `SlamAsr`, from the study's models and the weights of the candidate's record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.asr.parts import Settings
from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.model.encoder import remove_layers, with_repaired_maps
from prunesearch.model.llm import with_lora
from prunesearch.model.loading import Models, load_models
from prunesearch.model.projector import Projector
from prunesearch.model.slam import SpeechLlm
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import ENCODER_FILE, TRAIN_AGAIN, WEIGHTS_FILE, RunRecord, record_folder
from prunesearch.training.finetune import restore, trainable
from prunesearch.training.tensors import read_tensors


@dataclass(frozen=True)
class StudyModels:
    """A study's models, loaded once for many candidates. The LLM is on `device`; the unpruned encoder stays on the CPU."""

    models: Models
    dtype: str
    device: torch.device

    @classmethod
    def load(cls, config: StudyConfig, dtype: str) -> "StudyModels":
        """Load the models for the first GPU, else the CPU. Raises StudyError when one cannot be loaded."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = load_models(config, getattr(torch, dtype))
        models.llm.to(device)
        return cls(models, dtype, device)


def weights_file(config: StudyConfig, record: RunRecord) -> Path:
    """The file with a record's projector and LoRA; it may have been deleted."""
    return record_folder(config.run_folder / "records", record.candidate) / WEIGHTS_FILE


def require_weights(config: StudyConfig, record: RunRecord) -> None:
    """Raises StudyError where the record's weights are missing."""
    if not (file := weights_file(config, record)).exists():
        raise StudyError([f"{file} is missing: the weights of {record.candidate.key} were deleted, or are on another machine"])


def encoder_of(config: StudyConfig, record: RunRecord, unpruned: WhisperEncoder) -> WhisperEncoder:
    """The record's pruned encoder, with the maps that its repair refitted.

    Raises StudyError where these are not kept: `training.repair.keep_maps_of` makes them again.
    """
    encoder = remove_layers(unpruned, record.removed_layers)
    if record.repair is None or record.repair.method != "layers":
        return encoder
    file = record_folder(config.run_folder / "records", record.candidate) / ENCODER_FILE
    if not file.exists():
        raise StudyError([f"{file} is missing: the repaired encoder of {record.candidate.key} was not kept; export it again"])
    return with_repaired_maps(
        encoder, read_tensors(file, encoder.state_dict(), "delete it and export it again", complete=False)
    )


def recorded_dtype(record: RunRecord) -> str:
    """The dtype that the record's system was trained and decoded in."""
    return str(record.provenance.get("dtype", "float32"))


def load_candidate(config: StudyConfig, record: RunRecord, merge: bool = False) -> SlamAsr:
    """Load the study's models and assemble the record's system.

    `merge` adds the LoRA to the LLM's weights. Raises StudyError where weights are missing or a model cannot be loaded.
    """
    require_weights(config, record)
    loaded = StudyModels.load(config, recorded_dtype(record))
    asr = assemble(config, record, loaded, with_lora(loaded.models.llm, record.lora_rank, config.llm, record.seed))
    if merge and record.lora_rank > 0:
        asr.slam.model = asr.slam.model.merge_and_unload()
        asr.settings = asr.settings.model_copy(update={"merged": True})
    return asr


def assemble(config: StudyConfig, record: RunRecord, loaded: StudyModels, model: Any) -> SlamAsr:
    """The record's system on the device of the loaded models.

    `model` is their LLM, with a LoRA of the record's rank if that is not 0; its weights are replaced by the record's. The
    pruned encoder shares its weights with the unpruned one and moves them to the device.
    """
    encoder = encoder_of(config, record, loaded.models.encoder).to(loaded.device)
    llm = loaded.models.llm
    width = llm.model.get_input_embeddings().embedding_dim
    projector = Projector.for_models(config.projector, encoder.config.d_model, width).to(loaded.device)
    slam = SpeechLlm(projector, llm, model)
    weights = trainable(slam)
    restore(weights, read_tensors(weights_file(config, record), weights, TRAIN_AGAIN))
    slam.projector.eval()
    model.eval()
    settings = Settings(
        dtype=loaded.dtype,
        removed_layers=record.removed_layers,
        encoder_layers=record.encoder_layers,
        shared_layers=config.shared_layers(record.encoder_layers),
        lora_rank=record.lora_rank,
        projector=config.projector,
        llm=config.llm.model_copy(update={"model": config.locate(config.llm.model)}),
        decoding=config.decoding,
        text=config.text,
        pad_to_seconds=config.data.pad_to_seconds,
    )
    return SlamAsr(encoder, loaded.models.extractor, slam, settings.without_paths(), loaded.device)
