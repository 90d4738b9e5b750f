"""The quickstart's Whisper: ten narrow layers, and a 16 ms hop instead of 10 ms (31 positions a second, not 50)."""

from functools import cache

from transformers import WhisperConfig, WhisperFeatureExtractor


@cache
def feature_extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80, hop_length=256, chunk_length=8)


def config(vocab_size: int) -> WhisperConfig:
    """250 positions are 8 s: 500 frames of 16 ms, halved by the second convolution."""
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=128,
        encoder_layers=10,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=512,
        max_source_positions=250,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
