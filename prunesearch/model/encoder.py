"""Encoders that consist of Whisper's layers, which can be removed. One of them takes input of any length.

Shapes: B batch, M mel bins, F mel frames, T encoder positions (F / 2, rounded up), D encoder width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prunesearch.model.checkpoint import Part, load_checkpoint, read_config
from prunesearch.model.checkpoint_files import CheckpointError
from prunesearch.model.surgery import read_by
from prunesearch.model.system import SpeechEncoder

SAMPLE_RATE = 16_000  # of all recordings that are read
ENCODER_PREFIX = r"^(model\.)?encoder\."  # of the encoder's tensors in a full Whisper checkpoint; an encoder folder has none
BESIDE_ENCODER = r"(model\.)?decoder\.|proj_out\.|(projector|classifier)\.|layer_weights$"  # decoder; audio classification
ENCODER = Part("encoder", ENCODER_PREFIX, BESIDE_ENCODER)


def load_encoder(source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> WhisperEncoder:
    """Load the encoder of a full Whisper checkpoint, or of an encoder-only folder. A decoder's weights are not read.

    Raises OSError when there is no such checkpoint, CheckpointError when it is not whole or not the encoder of its
    configuration.
    """
    config = read_config(source, revision)
    if config.model_type != "whisper":
        raise CheckpointError(f"must be a Whisper checkpoint, got one of type {config.model_type!r}")
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return load_checkpoint(WhisperEncoder, source, revision, config, ENCODER, **options)


def positions_of(frames: Tensor) -> Tensor:
    """Mel frames (B,) -> encoder positions (B,): the second convolution has stride 2."""
    return (frames + 1) // 2


def padding_mask(lengths: Tensor, width: int) -> Tensor | None:
    """(B,) -> boolean (B, 1, T, T), True where a position may be attended to; None when nothing is padded."""
    if bool((lengths == width).all()):
        return None
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]  # (B, T)
    return inside[:, None, None, :].expand(-1, 1, width, -1)


class WhisperLayers(SpeechEncoder):
    """An encoder that consists of Whisper's layers. A study freezes its encoder, so that dropout is off."""

    @property
    def width(self) -> int:
        return int(self.module.config.d_model)

    @property
    def window_seconds(self) -> float:
        return float(self.module.max_source_positions * 2 * self.extractor.hop_length / SAMPLE_RATE)

    def positions(self, seconds: float) -> int:
        return round(seconds * SAMPLE_RATE / (2 * self.extractor.hop_length))

    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        """(M, F) by the checkpoint's own feature extractor, without padding to 30 s.

        A recording shorter than the extractor's window is padded to one.
        """
        samples = np.pad(samples, (0, max(0, self.extractor.n_fft - len(samples))))
        out = self.extractor(
            samples, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="pt", device=str(device)
        )
        mel: Tensor = out["input_features"][0]
        return mel

    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Convolutions and position embeddings: (B, M, F), frames (B,) -> (B, T, D), positions (B,).

        Whisper itself always reads 30 s. Here, the position embeddings are cut to the input's length, and everything beyond an
        utterance's own frames is set to zero before each convolution, so that an utterance's states do not depend on its
        batch. Raises ValueError for an input longer than the encoder's position embeddings.
        """
        encoder = self.module
        inside = (torch.arange(features.shape[-1], device=frames.device) < frames[:, None])[:, None]  # (B, 1, F)
        hidden = nn.functional.gelu(encoder.conv1(features * inside))
        hidden = nn.functional.gelu(encoder.conv2(hidden * inside)).transpose(1, 2)  # (B, T, D)
        if hidden.shape[1] > encoder.max_source_positions:
            raise ValueError(
                f"an utterance must have at most {encoder.max_source_positions} encoder positions, got {hidden.shape[1]}"
            )
        hidden = self.with_places(hidden)
        return nn.functional.dropout(hidden, encoder.dropout, encoder.training), positions_of(frames)

    def with_places(self, hidden: Tensor) -> Tensor:
        """Add the position embeddings, which a checkpoint may keep in fp32: (B, T, D) -> (B, T, D)."""
        return (hidden + self.module.embed_positions.weight[: hidden.shape[1]]).to(hidden.dtype)

    def run(self, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        mask = padding_mask(lengths, hidden.shape[1])
        for layer in self.layers[first:last]:
            hidden = layer(hidden, mask)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.module.layer_norm(hidden)
        return out

    def attention_map(self, layer: Any) -> nn.Linear:
        return layer.self_attn.out_proj

    def attention_heads(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        with read_by(layer.self_attn.out_proj) as heads:
            normed = layer.self_attn_layer_norm(hidden)
            layer.self_attn(hidden_states=normed, attention_mask=padding_mask(lengths, hidden.shape[1]))
        return heads[0]

    def feed_forward_map(self, layer: Any) -> nn.Linear:
        return layer.fc2

    def activations(self, layer: Any, middle: Tensor) -> Tensor:
        inner: Tensor = layer.activation_fn(layer.fc1(layer.final_layer_norm(middle)))
        return inner


class WindowedWhisper(WhisperLayers):
    """A Whisper encoder that reads every recording as a whole window, and gives all of it on."""

    def positions(self, seconds: float) -> int:
        return int(self.module.max_source_positions)

    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        """(M, F) of the recording, padded with silence to the window."""
        out = self.extractor(samples, sampling_rate=SAMPLE_RATE, truncation=False, return_tensors="pt", device=str(device))
        mel: Tensor = out["input_features"][0]
        return mel
