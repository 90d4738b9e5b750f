"""Names of models: local folders, hub names, and what to say when one cannot be had."""

from pathlib import Path
from typing import Any

from prunesearch.study.config import EncoderConfig, LlmConfig, StudyConfig
from prunesearch.study.errors import StudyError

# Dimensions of models that studies name often, so that a plan needs no network.
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


def known_architecture(name: str) -> Any | None:
    """The configuration of a model whose dimensions stand here, without tokenizer details; None for any other name."""
    from transformers import Qwen2Config, WhisperConfig

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
    return None


def read_architecture(config: StudyConfig, part: EncoderConfig | LlmConfig) -> Any:
    """A model's configuration, from its folder, from the table above, or from the hub. Raises StudyError when there is none."""
    from transformers import AutoConfig

    source = config.locate(part.model)
    known = None if Path(source).exists() or part.revision else known_architecture(source)
    if known is not None:
        return known
    try:
        return AutoConfig.from_pretrained(source, revision=part.revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_be_had(part, source, error) from error


def architectures(config: StudyConfig) -> tuple[Any, Any]:
    """The configurations of encoder and LLM. Raises StudyError when one cannot be read, or is of another kind."""
    encoder, llm = read_architecture(config, config.encoder), read_architecture(config, config.llm)
    lines = []
    if not hasattr(encoder, "encoder_layers") or not hasattr(encoder, "num_mel_bins"):
        lines.append(f"encoder.model: must be a Whisper checkpoint, got one of type {encoder.model_type!r}")
    if getattr(llm, "is_encoder_decoder", False) or not hasattr(llm, "vocab_size"):
        lines.append(f"llm.model: must be a decoder-only language model, got one of type {llm.model_type!r}")
    if lines:
        raise StudyError(lines)
    return encoder, llm


def cannot_be_had(part: EncoderConfig | LlmConfig, source: str, error: Exception) -> StudyError:
    """One line that says why, and one that says what to do."""
    key = "encoder.model" if isinstance(part, EncoderConfig) else "llm.model"
    folder = f'give a local folder instead: {key} = "/path/to/{Path(source).name}"'
    seen = _names_of_causes(error)
    if Path(source).exists():
        line, advice = f"{source} cannot be loaded: {_first_line(error)}", "it must be a Hugging Face folder with safetensors"
    elif "HFValidationError" in seen:
        line, advice = (
            f"there is no folder {source}, and it cannot be a hub name",
            "see where the path starts: at the study file",
        )
    elif "GatedRepoError" in seen:
        line, advice = f"{source} is gated", f"accept its terms on the hub and log in (`hf auth login`), or {folder}"
    elif "RevisionNotFoundError" in seen:
        line, advice = f"the hub's {source} has no revision {part.revision!r}", "see its page for branches and tags"
    elif "RepositoryNotFoundError" in seen:
        line, advice = f"the hub has no model {source} (or it is private)", f"see its name, or {folder}"
    elif seen & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"}:
        line, advice = f"the hub cannot be reached, and {source} is not in its cache on this machine", folder
    else:
        line, advice = f"{source} cannot be loaded: {_first_line(error)}", folder
    return StudyError([f"{key}: {line}", advice])


def _names_of_causes(error: BaseException | None) -> set[str]:
    names = set()
    while error is not None:
        names.add(type(error).__name__)
        error = error.__cause__ or error.__context__
    return names


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
