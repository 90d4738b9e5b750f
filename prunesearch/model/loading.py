"""Load a study's models: encoder, feature extractor and LLM."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.encoder import load_encoder
from prunesearch.model.hub import architectures, loading_error
from prunesearch.model.llm import Llm, load_llm
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError


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

    Raises OSError when there is no such checkpoint, ValueError when a part of it is missing.
    """
    encoder = load_encoder(source, revision, dtype).requires_grad_(False).eval()
    extractor = AutoFeatureExtractor.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    return encoder, extractor
