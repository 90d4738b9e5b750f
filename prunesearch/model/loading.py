"""Load a study's models: encoder, feature extractor and LLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.checkpoint import library_errors
from prunesearch.model.checkpoint_files import CheckpointError, MissingFileError
from prunesearch.model.encoder import load_encoder
from prunesearch.model.hub import architectures, loading_error
from prunesearch.model.llm import Llm, load_llm
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError

EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")  # transformers reads either
SAMPLE_RATE = 16_000  # of all recordings that are read


@dataclass(frozen=True)
class Models:
    """The frozen models that all candidates of a study start from."""

    encoder: WhisperEncoder  # unpruned
    extractor: Any  # its feature extractor
    llm: Llm


def load_models(config: StudyConfig, dtype: torch.dtype) -> Models:
    """Load the study's models on the CPU (a quantised LLM: on the GPU), frozen and in evaluation mode.

    Raises StudyError when one of them cannot be loaded or is of the wrong kind.
    """
    architectures(config)  # the wrong kind of model is reported before gigabytes are loaded
    source = config.locate(config.encoder.model)
    try:
        encoder, extractor = load_encoder_and_extractor(source, config.encoder.revision, dtype)
    except (OSError, ValueError) as error:
        raise loading_error(config.encoder, source, error) from error
    source = config.locate(config.llm.model)
    try:
        llm = load_llm(source, config.llm, dtype)
    except StudyError:  # a ValueError, too, but it names its key already
        raise
    except (OSError, ValueError) as error:
        raise loading_error(config.llm, source, error) from error
    return Models(encoder, extractor, llm)


def load_encoder_and_extractor(source: str | Path, revision: str | None, dtype: torch.dtype) -> tuple[WhisperEncoder, Any]:
    """Load a Whisper encoder, frozen and in evaluation mode, and the feature extractor beside it.

    Raises OSError or ValueError when there is no such checkpoint, CheckpointError when a part of it is missing or damaged, or
    the feature extractor does not fit the encoder.
    """
    encoder = load_encoder(source, revision, dtype).requires_grad_(False).eval()
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in EXTRACTOR_FILES):
        raise MissingFileError(f"{EXTRACTOR_FILES[0]} is missing, the encoder's feature extractor: copy it, too")
    with library_errors("its feature extractor (preprocessor_config.json) cannot be loaded", local=folder.is_dir()):
        extractor = AutoFeatureExtractor.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    _require_fitting_extractor(extractor, encoder)
    return encoder, extractor


def _require_fitting_extractor(extractor: Any, encoder: WhisperEncoder) -> None:
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
