"""Load an encoder with its feature extractor, and the encoder and the LLM that a study names."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

from prunesearch.model.checkpoint import library_errors
from prunesearch.model.checkpoint_files import CheckpointError, MissingFileError
from prunesearch.model.encoder import SAMPLE_RATE, WhisperLayers, load_encoder
from prunesearch.model.hub import architectures, loading_error
from prunesearch.model.llm import Llm, load_llm
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError

EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")  # transformers reads either


def load_studys_encoder(config: StudyConfig, dtype: torch.dtype) -> WhisperLayers:
    """The encoder that the study names, on the CPU, frozen and in evaluation mode. Raises StudyError where it cannot be loaded,
    or where it or the LLM is of the wrong kind.
    """
    architectures(config)  # the wrong kind of model is reported before gigabytes are loaded
    part = config.slam.encoder
    source = config.locate(part.model)
    try:
        return load_encoder_and_extractor(source, part.revision, dtype)
    except (OSError, ValueError) as error:
        raise loading_error(part, source, error) from error


def load_studys_llm(config: StudyConfig, dtype: torch.dtype) -> Llm:
    """The LLM that the study names, on the CPU (a quantised one: on the GPU), frozen and in evaluation mode. Raises StudyError
    where it cannot be loaded.
    """
    part = config.slam.llm
    source = config.locate(part.model)
    try:
        return load_llm(source, part, dtype)
    except StudyError:  # a ValueError, too, but it names its key already
        raise
    except (OSError, ValueError) as error:
        raise loading_error(part, source, error) from error


def load_encoder_and_extractor(source: str | Path, revision: str | None, dtype: torch.dtype) -> WhisperLayers:
    """Load a Whisper encoder, frozen and in evaluation mode, and the feature extractor beside it.

    Raises OSError or ValueError when there is no such checkpoint, CheckpointError when a part of it is missing or damaged, or
    the feature extractor does not fit the encoder.
    """
    encoder = load_encoder(source, revision, dtype).requires_grad_(False).eval()
    return WhisperLayers(encoder, load_extractor(source, revision, encoder))


def load_extractor(source: str | Path, revision: str | None, encoder: Any) -> Any:
    """The feature extractor beside a Whisper encoder.

    Raises OSError when there is none, CheckpointError when it is damaged or does not fit the encoder.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in EXTRACTOR_FILES):
        raise MissingFileError(f"{EXTRACTOR_FILES[0]} is missing, the encoder's feature extractor: copy it, too")
    with library_errors("its feature extractor (preprocessor_config.json) cannot be loaded", local=folder.is_dir()):
        extractor = AutoFeatureExtractor.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    _require_fitting_extractor(extractor, encoder)
    return extractor


def _require_fitting_extractor(extractor: Any, encoder: Any) -> None:
    """Raises CheckpointError where the extractor's features are not what the encoder reads."""
    if not isinstance(extractor, WhisperFeatureExtractor):
        kind = type(extractor).__name__
        raise CheckpointError(
            f"preprocessor_config.json must describe a WhisperFeatureExtractor, got {kind}: copy the encoder's"
        )
    bins, size, rate = encoder.config.num_mel_bins, extractor.feature_size, extractor.sampling_rate
    if size != bins:
        raise CheckpointError(
            f"feature_size in preprocessor_config.json must be {bins}, the encoder's num_mel_bins, got {size}: "
            "copy the preprocessor_config.json that belongs to the encoder"
        )
    if rate != SAMPLE_RATE:
        raise CheckpointError(
            f"sampling_rate in preprocessor_config.json must be {SAMPLE_RATE}, which recordings are converted to, got {rate}"
        )
