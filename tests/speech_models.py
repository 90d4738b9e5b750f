"""Speech models of toy size that exist already, one function for each family: random weights, with processor and tokenizer."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    GenerationConfig,
    GlmAsrConfig,
    GlmAsrForConditionalGeneration,
    GlmAsrProcessor,
    MossTranscribeDiarizeConfig,
    MossTranscribeDiarizeFeatureExtractor,
    MossTranscribeDiarizeForConditionalGeneration,
    MossTranscribeDiarizeProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.qwen3_asr.feature_extraction_qwen3_asr import Qwen3ASRFeatureExtractor
from transformers.models.qwen3_asr.processing_qwen3_asr import Qwen3ASRProcessor

from tests.conftest import LAYERS, WORDS

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|da|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]


def save_whisper(folder: Path, is_multilingual: bool = True) -> WhisperForConditionalGeneration:
    """A Whisper of toy size with random weights, its tokenizer, and a window of two seconds."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([f" {word}" for word in WORDS], trainer)
    tokenizer.add_special_tokens(SPECIAL)  # behind the text's tokens: what follows them are timestamps
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    end = ids["<|endoftext|>"]
    config = WhisperConfig(
        d_model=32, encoder_layers=LAYERS, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=64, max_source_positions=100, max_target_positions=40, vocab_size=300,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    settings: dict[str, Any] = {
        "pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "max_length": 40,
        "decoder_start_token_id": ids["<|startoftranscript|>"], "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": is_multilingual,
    }  # fmt: skip
    if is_multilingual:
        settings["lang_to_id"] = {token: ids[token] for token in ("<|en|>", "<|da|>")}
        settings["task_to_id"] = {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")}
    model.generation_config = GenerationConfig(**settings)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:])
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=2), fast).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


TOWER_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
    "<|audio_bos|>",
]
TOWER_SPECIAL += ["<|AUDIO|>", "<|audio_eos|>"]
NAMES = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}{% endfor %}"
)

GENERATING = TEMPLATE.replace("loop.last and continue_final_message", "false") + "<|im_start|>assistant\n"


def toy_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(TOWER_SPECIAL)
    tokenizer.add_tokens(["<asr_text>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names
    )


TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip


def _save(folder: Path, model: Any, processor: Any) -> None:
    """Write model and processor. A text ends with the tokenizer's end of sequence, or with padding."""
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    model.eval().generation_config = GenerationConfig(eos_token_id=[pad, end], pad_token_id=pad)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def save_qwen3_asr(folder: Path) -> None:
    """A Qwen3-ASR of toy size with random weights, its processor and tokenizer."""
    torch.manual_seed(0)
    fast = toy_tokenizer(**NAMES)
    pad, end, audio = fast.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|audio_pad|>"])
    config = Qwen3ASRConfig(
        audio_config={
            "encoder_layers": LAYERS, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 128,
            "output_dim": 32, "downsample_hidden_size": 8, "n_window_infer": 100, "initializer_range": 0.1,
        },
        text_config={"model_type": "qwen3", "tie_word_embeddings": True, **TEXT},
        audio_token_id=audio, pad_token_id=pad, eos_token_id=[pad, end],
    )  # fmt: skip
    model = Qwen3ASRForConditionalGeneration(config)
    _save(folder, model, Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), fast, chat_template=TEMPLATE))


def save_glm_asr(folder: Path) -> None:
    """A GLM-ASR of toy size with random weights, its processor and tokenizer, and a window of four seconds."""
    torch.manual_seed(0)
    fast = toy_tokenizer()
    pad, end, audio = fast.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|audio_pad|>"])
    config = GlmAsrConfig(
        audio_config={
            "num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2,
            "num_mel_bins": 128, "max_position_embeddings": 200, "initializer_range": 0.1,
        },
        text_config={"model_type": "llama", "eos_token_id": [pad, end], "tie_word_embeddings": False, **TEXT},
        audio_token_id=audio,
    )  # fmt: skip
    model = GlmAsrForConditionalGeneration(config)
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=4)
    processor = GlmAsrProcessor(extractor, fast, chat_template=GENERATING, audio_token="<|audio_pad|>")
    _save(folder, model, processor)


WHISPER_TOWER = {
    "num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_mel_bins": 80,
    "max_source_positions": 200, "initializer_range": 0.1,
}  # fmt: skip


def save_audio_flamingo(folder: Path) -> None:
    """An Audio Flamingo 3 of toy size with random weights, and a window of four seconds."""
    torch.manual_seed(0)
    fast = toy_tokenizer()
    audio = fast.convert_tokens_to_ids("<|audio_pad|>")
    config = AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **WHISPER_TOWER},
        text_config={"model_type": "qwen2", "tie_word_embeddings": False, **TEXT}, audio_token_id=audio,
    )  # fmt: skip
    model = AudioFlamingo3ForConditionalGeneration(config)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    processor = AudioFlamingo3Processor(extractor, fast, chat_template=GENERATING, audio_token="<|audio_pad|>")
    _save(folder, model, processor)


def save_qwen2_audio(folder: Path) -> None:
    """A Qwen2-Audio of toy size with random weights, and a window of four seconds. Its processor has a chat template itself."""
    torch.manual_seed(0)
    fast = toy_tokenizer()
    audio = fast.convert_tokens_to_ids("<|AUDIO|>")
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **WHISPER_TOWER},
        text_config={"model_type": "qwen2", "tie_word_embeddings": False, **TEXT}, audio_token_index=audio,
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(config)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    _save(folder, model, Qwen2AudioProcessor(extractor, fast))


def save_moss(folder: Path) -> None:
    """A MOSS-Transcribe-Diarize of toy size with random weights, and a window of four seconds."""
    torch.manual_seed(0)
    fast = toy_tokenizer()
    audio = fast.convert_tokens_to_ids("<|audio_pad|>")
    config = MossTranscribeDiarizeConfig(
        audio_config=WHISPER_TOWER, text_config={"model_type": "qwen3", "tie_word_embeddings": True, **TEXT},
        audio_token_id=audio, audio_chunk_size=64_000,
    )  # fmt: skip
    model = MossTranscribeDiarizeForConditionalGeneration(config)
    extractor = MossTranscribeDiarizeFeatureExtractor(chunk_length=4)
    # the model itself has a mark of the time every two seconds; the toy's recordings are shorter
    processor = MossTranscribeDiarizeProcessor(extractor, fast, chat_template=GENERATING, time_marker_every_seconds=1)
    _save(folder, model, processor)


def save_voxtral(folder: Path) -> None:
    """A Voxtral of toy size with random weights. Its processor knows windows of 30 s only."""
    tokenizers = pytest.importorskip("mistral_common.tokens.tokenizers.base")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    names = [token.value for token in tokenizers.SpecialTokens][:33]
    names.remove("[AUDIO]")
    names.insert(24, "[AUDIO]")  # its number in every Voxtral
    pieces = [*(bytes([i]) for i in range(256)), *(f"{space}{word}".encode() for space in ("", " ") for word in WORDS)]
    vocabulary = {
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None} for i, p in enumerate(pieces)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
        "config": {
            "pattern": r"\s?[^\s]+", "num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + len(names),
            "default_num_special_tokens": len(names), "version": "v11",
        },
        "audio": {
            "sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 80, "hop_length": 160, "window_size": 400},
        },
        "version": 1, "type": "Tekken",
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(vocabulary))
    torch.manual_seed(0)
    config = VoxtralConfig(
        audio_config={**WHISPER_TOWER, "intermediate_size": 128, "max_source_positions": 1500},
        text_config={"model_type": "llama", "tie_word_embeddings": False, **TEXT}, audio_token_id=24,
    )  # fmt: skip
    VoxtralForConditionalGeneration(config).save_pretrained(folder)
    processor = VoxtralProcessor(WhisperFeatureExtractor(feature_size=80), MistralCommonBackend.from_pretrained(folder))
    processor.save_pretrained(folder)


TOWERS = {
    "qwen3_asr": save_qwen3_asr,
    "glmasr": save_glm_asr,
    "audioflamingo3": save_audio_flamingo,
    "qwen2_audio": save_qwen2_audio,
    "moss_transcribe_diarize": save_moss,
    "voxtral": save_voxtral,
}
