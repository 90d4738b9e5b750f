"""A Whisper encoder whose layers can be removed and whose input may be of any length.

Shapes: B batch, M mel bins, F mel frames, T positions (F / 2, rounded up), D width.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder


def load_encoder(source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> WhisperEncoder:
    """The encoder of a Whisper checkpoint, or of an encoder-only folder; a decoder's weights are never read.

    Raises OSError when there is no such checkpoint.
    """
    return WhisperEncoder.from_pretrained(
        source,
        revision=revision or "main",
        dtype=dtype,
        use_safetensors=True,
        attn_implementation="sdpa",
        key_mapping={r"^(model\.)?encoder\.": ""},
    )


def remove_layers(encoder: WhisperEncoder, removed_layers: Iterable[int]) -> WhisperEncoder:
    """A `WhisperEncoder` without the given (zero-based) layers. It shares the weights of the layers that stay.

    Layers are deleted from the module list and from the config; the final LayerNorm stays, as in the published work.
    Raises ValueError for an index outside the encoder.
    """
    removed = set(removed_layers)
    depth = len(encoder.layers)
    if outside := sorted(i for i in removed if not 0 <= i < depth):
        raise ValueError(f"removed_layers must lie in [0, {depth}), got {outside[0]}: indices are zero-based")
    config = copy.deepcopy(encoder.config)
    config.encoder_layers = depth - len(removed)
    with torch.device("meta"):  # a frame to hang the original's modules into: nothing is allocated
        pruned = WhisperEncoder(config)
    for name, module in encoder.named_children():
        setattr(pruned, name, module)
    pruned.layers = nn.ModuleList(layer for i, layer in enumerate(encoder.layers) if i not in removed)
    return pruned.train(encoder.training)


def positions_of(frames: Tensor) -> Tensor:
    """Encoder positions of so many mel frames: the second convolution has stride 2."""
    return (frames + 1) // 2


def _padding_mask(lengths: Tensor, width: int) -> Tensor | None:
    """(B, 1, T, T) boolean, True where a position may be attended to; None when nothing is padded."""
    if bool((lengths == width).all()):
        return None
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]  # (B, T)
    return inside[:, None, None, :].expand(-1, 1, width, -1)


def embed(encoder: WhisperEncoder, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Convolutions and position embeddings: (B, M, F), (B,) -> (B, T, D), lengths (B,).

    Whisper reads 30 s, always. Here positions are sliced to the input's length, and what lies beyond an utterance's
    own frames is zero wherever a convolution reads it: the batch it came in leaves no trace.
    """
    inside = (torch.arange(features.shape[-1], device=frames.device) < frames[:, None])[:, None]  # (B, 1, F)
    hidden = nn.functional.gelu(encoder.conv1(features * inside))
    hidden = nn.functional.gelu(encoder.conv2(hidden * inside)).transpose(1, 2)  # (B, T, D)
    if hidden.shape[1] > encoder.max_source_positions:
        raise ValueError(f"an utterance has {hidden.shape[1]} positions, the encoder knows {encoder.max_source_positions}")
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    return nn.functional.dropout(hidden, encoder.dropout, encoder.training), positions_of(frames)


def run_layers(encoder: WhisperEncoder, hidden: Tensor, lengths: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Layers `first` to `last` (exclusive): (B, T, D), lengths (B,) -> (B, T, D)."""
    mask = _padding_mask(lengths, hidden.shape[1])
    for layer in encoder.layers[first:last]:
        hidden = layer(hidden, mask)
    return hidden


def encode(encoder: WhisperEncoder, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The whole encoder: (B, M, F), frames (B,) -> states (B, T, D), lengths (B,); states beyond a length mean nothing."""
    hidden, lengths = embed(encoder, features, frames)
    return encoder.layer_norm(run_layers(encoder, hidden, lengths)), lengths
