"""Audio towers of speech-LLMs, cut open between their layers: one class for each way of windows, packing and padding.

Shapes: B batch, M mel bins, F mel frames, T tower positions, D tower width, N valid positions of a batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunesearch.model.encoder import SAMPLE_RATE, WhisperLayers
from prunesearch.model.surgery import read_by
from prunesearch.model.system import SpeechEncoder

CONVOLVED = 4  # mel frames behind a recording that the convolutions of its last position read


class PackedTower(SpeechEncoder):
    """Qwen3-ASR's tower. Convolutions see chunks of `2 * n_window` mel frames, attention sees windows of some chunks, and the
    positions of a batch lie one behind the other: padding is never computed.
    """

    @property
    def width(self) -> int:
        return int(self.module.config.d_model)

    @property
    def _chunk(self) -> int:
        """Mel frames of a chunk."""
        return 2 * int(self.module.n_window)

    def positions(self, seconds: float) -> int:
        frames = torch.tensor([round(seconds * SAMPLE_RATE / self.extractor.hop_length)])
        return int(self._lengths(frames).sum())

    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        """(M, F): the frames that the model's own feature extractor marks as valid."""
        out = self.extractor(
            samples, sampling_rate=SAMPLE_RATE, padding=True, truncation=False, return_attention_mask=True,
            return_tensors="pt", device=str(device),
        )  # fmt: skip
        mel: Tensor = out["input_features"][0][:, : int(out["attention_mask"][0].sum())]
        return mel

    def _lengths(self, frames: Tensor) -> Tensor:
        """Mel frames (B,) -> positions of each chunk (B, chunks): three convolutions halve them."""
        chunks = int(-(-frames.max() // self._chunk))
        starts = torch.arange(chunks, device=frames.device) * self._chunk
        lengths: Tensor = (frames[:, None] - starts).clamp(0, self._chunk)
        for _ in range(3):
            lengths = torch.where(lengths > 0, (lengths - 1) // 2 + 1, lengths)
        return lengths

    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        tower, chunk, (batch, bins, width) = self.module, self._chunk, features.shape
        padded = nn.functional.pad(features, (0, -width % chunk))
        chunks = padded.shape[-1] // chunk
        hidden = padded.view(batch, bins, chunks, chunk).transpose(1, 2).reshape(batch * chunks, 1, bins, chunk)
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            hidden = nn.functional.gelu(convolution(hidden))
        hidden = tower.conv_out(hidden.permute(0, 3, 1, 2).flatten(2))  # (B * chunks, positions, D)
        hidden = hidden + tower.positional_embedding.positional_embedding[: hidden.shape[1]].to(hidden.dtype)
        lengths = self._lengths(frames).sum(1)  # only an utterance's last chunk has fewer positions
        return hidden.reshape(batch, -1, hidden.shape[-1])[:, : int(lengths.max())], lengths

    def run(self, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        packed, bounds = self._packed(hidden, lengths)
        for layer in self.layers[first:last]:
            packed = layer(packed, bounds)[0]
        return self._padded(packed, hidden, lengths)

    def _packed(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> all valid positions (N, D), and the bounds of the attention's windows among them."""
        window = int(self._lengths(torch.tensor([self._chunk])).sum()) * (self.module.n_window_infer // self._chunk)
        sizes = [min(window, n - start) for n in lengths.tolist() for start in range(0, n, window)]
        bounds = torch.tensor([0, *sizes], device=lengths.device).cumsum(0, dtype=torch.int32)
        return hidden.flatten(0, 1) if _is_full(hidden, lengths) else hidden[_inside(hidden, lengths)], bounds

    @staticmethod
    def _padded(packed: Tensor, like: Tensor, lengths: Tensor) -> Tensor:
        if _is_full(like, lengths):
            return packed.reshape(*like.shape[:2], -1)
        out = packed.new_zeros(*like.shape[:2], packed.shape[-1])
        out[_inside(like, lengths)] = packed
        return out

    def norm(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.module.ln_post(hidden)
        return out

    def attention_map(self, layer: Any) -> nn.Linear:
        return layer.self_attn.out_proj

    def attention_heads(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        packed, bounds = self._packed(hidden, lengths)
        with read_by(layer.self_attn.out_proj) as heads:
            layer.self_attn(hidden_states=layer.self_attn_layer_norm(packed), cu_seqlens=bounds)
        return self._padded(heads[0], hidden, lengths)

    def feed_forward_map(self, layer: Any) -> nn.Linear:
        return layer.fc2

    def activations(self, layer: Any, middle: Tensor) -> Tensor:
        inner: Tensor = layer.activation_fn(layer.fc1(layer.final_layer_norm(middle)))
        return inner


class MarkedFeatures(SpeechEncoder):
    """A tower that is fed a whole window of mel frames, silence included, and told which of them belong to the recording.

    Features have one row more than mel bins: 1 where a frame belongs to the recording.
    """

    def positions(self, seconds: float) -> int:
        return self._read(round(seconds * SAMPLE_RATE / self.extractor.hop_length))

    def computed(self, length: int) -> int:
        return int(_halved(self.extractor.nb_max_frames))

    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        out = self.extractor(
            samples, sampling_rate=SAMPLE_RATE, truncation=False, return_attention_mask=True, return_tensors="pt",
            device=str(device),
        )  # fmt: skip
        inside = out["attention_mask" if "attention_mask" in out else "input_features_mask"]
        return torch.cat([out["input_features"][0], inside[:1].to(out["input_features"].dtype)])

    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.gelu(self.module.conv1(features[:, :-1]))
        hidden = nn.functional.gelu(self.module.conv2(hidden)).transpose(1, 2)
        return hidden, self._read(features[:, -1].sum(1).long())

    def _read(self, frames: Any) -> Any:
        """Mel frames of recordings -> positions that are read of them."""
        return _halved(frames)


class RotaryTower(MarkedFeatures):
    """GLM-ASR's tower: it attends to a whole window, silence included; the language model reads the recording's part only."""

    @property
    def width(self) -> int:
        return int(self.module.config.hidden_size)

    def run(self, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        places = self._places(hidden)
        for layer in self.layers[first:last]:
            hidden = layer(hidden, position_embeddings=places)
        return hidden

    def _places(self, hidden: Tensor) -> Any:
        """Rotary position embeddings."""
        return self.module.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1], device=hidden.device)[None])

    def norm(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.module.norm(hidden)
        return out

    def attention_map(self, layer: Any) -> nn.Linear:
        return layer.self_attn.o_proj

    def attention_heads(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        with read_by(layer.self_attn.o_proj) as heads:
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), position_embeddings=self._places(hidden))
        return heads[0]

    def feed_forward_map(self, layer: Any) -> nn.Linear:
        return layer.mlp.fc2

    def activations(self, layer: Any, middle: Tensor) -> Tensor:
        inner: Tensor = layer.mlp.act_fn(layer.mlp.fc1(layer.post_attention_layernorm(middle)))
        return inner


@dataclass(frozen=True)
class WhisperTower(MarkedFeatures, WhisperLayers):
    """MOSS's tower: Whisper's encoder on a whole window, silence included. The language model reads the recording's part in
    groups of positions; the last one is filled from the silence behind it.
    """

    group: int = 1

    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        hidden, lengths = super().embed(features, frames)
        return self.with_places(hidden), lengths

    def run(self, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        return super().run(hidden, self._whole(hidden), first, last)

    def attention_heads(self, layer: Any, hidden: Tensor, lengths: Tensor) -> Tensor:
        return super().attention_heads(layer, hidden, self._whole(hidden))

    @staticmethod
    def _whole(hidden: Tensor) -> Tensor:
        """The lengths (B,) of windows that are read whole."""
        return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)

    def _read(self, frames: Any) -> Any:
        return -(-_halved(frames) // self.group) * self.group


class MaskedTower(MarkedFeatures, WhisperLayers):
    """Audio Flamingo's and Qwen2-Audio's towers: Whisper's encoder, in which no position attends to the silence behind the
    recording. Positions there are not computed.

    Pairs of positions are averaged before the norm behind the last layer: `TowerProjector` does both.
    """

    def computed(self, length: int) -> int:
        return length

    def features(self, samples: NDArray[np.float32], device: torch.device) -> Tensor:
        marked = super().features(samples, device)
        return marked[:, : int(marked[-1].sum()) + CONVOLVED]

    def embed(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        hidden, lengths = super().embed(features, frames)
        return self.with_places(hidden[:, : int(lengths.max())]), lengths

    def norm(self, hidden: Tensor) -> Tensor:
        return hidden


def _halved(frames: Any) -> Any:
    """Mel frames -> tower positions: the second convolution has stride 2."""
    return (frames - 1) // 2 + 1


def _is_full(hidden: Tensor, lengths: Tensor) -> bool:
    """Whether nothing of (B, T, D) is padding."""
    return bool((lengths == hidden.shape[1]).all())


def _inside(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, T), True where a position belongs to its utterance."""
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
