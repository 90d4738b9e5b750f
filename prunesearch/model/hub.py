"""Names of models: local folders and hub names, their configurations, and the error when one cannot be loaded."""

import os
from pathlib import Path
from typing import Any

from prunesearch.model.checkpoint_files import CheckpointError, summary
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import KEYS, LEAST_ENCODER_LAYERS, ModelSection

# Dimensions of models that studies often use, so that planning needs no network.
_WHISPER = {  # layers, width, heads, mel bins, decoder layers
    "openai/whisper-tiny": (4, 384, 6, 80, 4),
    "openai/whisper-base": (6, 512, 8, 80, 6),
    "openai/whisper-small": (12, 768, 12, 80, 12),
    "openai/whisper-medium": (24, 1024, 16, 80, 24),
    "openai/whisper-large-v2": (32, 1280, 20, 80, 32),
    "openai/whisper-large-v3": (32, 1280, 20, 128, 32),
    "openai/whisper-large-v3-turbo": (32, 1280, 20, 128, 4),
    "distil-whisper/distil-large-v3": (32, 1280, 20, 128, 2),
}
_QWEN2 = {  # width, feed-forward width, layers, heads, key-value heads, vocabulary, tied embeddings
    "Qwen/Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen/Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
_QWEN3_ASR = {  # tower: layers, width, heads; language model: width, feed-forward width
    "Qwen/Qwen3-ASR-0.6B-hf": (18, 896, 14, 1024, 3072),
    "Qwen/Qwen3-ASR-1.7B-hf": (24, 1024, 16, 2048, 6144),
}
_VOXTRAL = {  # language model: width, feed-forward width, layers
    "mistralai/Voxtral-Mini-3B-2507": (3072, 8192, 30),
    "mistralai/Voxtral-Small-24B-2507": (5120, 32_768, 40),
}
_QWEN2_AUDIO = "Qwen/Qwen2-Audio-7B-Instruct"
_GLM_ASR, _MOSS = "zai-org/GLM-ASR-Nano-2512", "hf-audio/MOSS-Transcribe-Diarize-HF"  # transformers' default configurations
CAUSAL_WITHOUT_SAYING = {"gpt_neox", "gpt_neox_japanese"}  # their `is_decoder` is False, and means nothing


def known_architecture(name: str) -> Any | None:
    """The configuration of a model in the tables above, without tokenizer details; None for any other name."""
    from transformers import (
        GlmAsrConfig,
        MossTranscribeDiarizeConfig,
        Qwen2AudioConfig,
        Qwen2Config,
        Qwen3ASRConfig,
        VoxtralConfig,
        WhisperConfig,
    )

    if name in _WHISPER:
        layers, width, heads, mels, decoder_layers = _WHISPER[name]
        return WhisperConfig(
            vocab_size=51_866 if mels == 128 else 51_865, num_mel_bins=mels, d_model=width, encoder_layers=layers,
            encoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_layers=decoder_layers,
            decoder_attention_heads=heads, decoder_ffn_dim=4 * width,
        )  # fmt: skip
    if name in _QWEN2:
        width, inner, layers, heads, kv_heads, vocabulary, tied = _QWEN2[name]
        return Qwen2Config(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        )  # fmt: skip
    if name == _GLM_ASR:
        return GlmAsrConfig()
    if name == _MOSS:
        return MossTranscribeDiarizeConfig()
    if name == _QWEN2_AUDIO:
        return Qwen2AudioConfig(text_config={"model_type": "qwen2", "vocab_size": 156_032, "intermediate_size": 11_008})
    if name in _VOXTRAL:
        width, inner, layers = _VOXTRAL[name]
        text = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        return VoxtralConfig(text_config={**text, "num_attention_heads": 32}, audio_token_id=24)
    if name in _QWEN3_ASR:
        layers, width, heads, llm_width, llm_inner = _QWEN3_ASR[name]
        audio = {
            "encoder_layers": layers, "d_model": width, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width,
            "output_dim": llm_width,
        }  # fmt: skip
        text = {
            "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": llm_width, "intermediate_size": llm_inner,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 65_536, "tie_word_embeddings": True,
        }  # fmt: skip
        return Qwen3ASRConfig(audio_config=audio, text_config=text)
    return None


def read_architecture(config: StudyConfig, part: ModelSection) -> Any:
    """A model's configuration, from its folder, the tables above, or the hub. Raises StudyError when there is none."""
    from prunesearch.model.checkpoint import read_config

    source = config.locate(part.source)
    known = None if Path(source).exists() or part.revision else known_architecture(source)
    if known is not None:
        return known
    try:
        return read_config(source, part.revision)
    except (OSError, ValueError) as error:
        raise loading_error(part, source, error) from error


def architectures(config: StudyConfig) -> tuple[Any, Any]:
    """The configurations of a SLAM-ASR system's encoder and LLM.

    Raises StudyError when one cannot be read or is of another kind, and when the encoder is too shallow for the baselines.
    """
    encoder, llm = read_architecture(config, config.slam.encoder), read_architecture(config, config.slam.llm)
    lines = []
    if not hasattr(encoder, "encoder_layers") or not hasattr(encoder, "num_mel_bins"):
        lines.append(f"encoder.model: must be a Whisper checkpoint, got one of type {encoder.model_type!r}")
    elif encoder.encoder_layers < LEAST_ENCODER_LAYERS:
        lines.append(
            f"encoder.model: must have at least three layers, got {encoder.encoder_layers}: "
            "the baseline top2 removes two, and one must stay"
        )
    if problem := unusable_llm(llm):
        lines.append(f"llm.model: {problem}")
    if lines:
        raise StudyError(lines)
    return encoder, llm


def unusable_llm(shape: Any) -> str | None:
    """Why a model of this configuration cannot be the LLM; None if it can."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = shape.model_type
    reads_ahead = getattr(shape, "is_decoder", None) is False and kind not in CAUSAL_WITHOUT_SAYING
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and hasattr(shape, "vocab_size")
    if not known or reads_ahead or getattr(shape, "is_encoder_decoder", False):
        return f"must be a decoder-only language model, got one of type {kind!r}"
    pad = getattr(shape, "pad_token_id", None)
    if pad is not None and pad >= shape.vocab_size:
        return f"pad_token_id in config.json must lie in [0, {shape.vocab_size}), the model's vocabulary, got {pad}"
    return None


def is_local(source: str) -> bool:
    """Whether a model or data set is named by a path of this (or another) machine, not by its hub name."""
    return Path(source).exists() or source.startswith(("/", ".", "~", "$"))


def name_without_path(source: str) -> str:
    """A hub name, unchanged; for a local file or folder, its base name, which reveals nothing about the machine."""
    return Path(os.path.abspath(source)).name if is_local(source) else source


def loading_error(part: ModelSection, source: str, error: Exception) -> StudyError:
    """The error for a study's model that cannot be loaded, with the reason and the fix."""
    key = KEYS[type(part)]
    use_folder = f'give a local folder instead: {key} = "/path/to/{Path(source).name}"'
    first, *more = explain_loading(source, part.revision, error, use_folder)
    return StudyError([f"{key}: {first}", *more])


def explain_loading(source: str, revision: str | None, error: Exception, use_folder: str = "") -> list[str]:
    """Reason and fix for a model that cannot be loaded, in one line, or in two where the fix is about its name.

    `use_folder` says how to give a local folder in the place of a hub name. `revision` is the one that was asked for.
    """
    causes = _names_of_causes(error)
    if "custom code" in str(error):  # transformers' words for an `auto_map` that it was not allowed to follow
        reason = f"{source} needs code of its own (`auto_map` in its configuration), which prunesearch never runs"
        return [reason, "use a model whose architecture and tokenizer transformers itself contains"]
    if isinstance(error, CheckpointError):
        return [f"{source}: {error}"]
    if Path(source).exists():
        return [f"{source} cannot be loaded: {summary(error)}; it must be a Hugging Face folder with safetensors"]
    if "HFValidationError" in causes:
        return [f"there is no folder {source}, and it cannot be a hub name", "relative paths start at the study file"]
    if "GatedRepoError" in causes:
        return [f"{source} is gated", f"accept its terms on the hub and log in (`hf auth login`), or {use_folder}"]
    if "RevisionNotFoundError" in causes:
        return [f"the hub's {source} has no revision {revision!r}", "its hub page lists branches and tags"]
    if "RepositoryNotFoundError" in causes:
        return [f"the hub has no model {source} (or it is private)", f"check its name, or {use_folder}"]
    if causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"}:
        return [f"the hub cannot be reached, and {source} is not in its cache on this machine", use_folder]
    return [f"{source} cannot be loaded: {summary(error)}", use_folder]


def _names_of_causes(error: BaseException | None) -> set[str]:
    names = set()
    while error is not None:
        names.add(type(error).__name__)
        error = error.__cause__ or error.__context__
    return names
