"""Layers are taken out of transformers' encoders, and their maps replaced. Nothing here knows a family.

An encoder has its layers in the module list `layers`, and their number in its configuration.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.study.config import DEPTHS


def remove_layers(encoder: Any, removed_layers: Iterable[int]) -> Any:
    """Build an encoder of the same class without the given (zero-based) layers. It shares the weights of the layers that stay.

    Layers are deleted from the module list and from the config. The final LayerNorm stays (arXiv 2603.27981).
    Raises ValueError for an index outside the encoder.
    """
    removed = set(removed_layers)
    depth = len(encoder.layers)
    if outside := sorted(i for i in removed if not 0 <= i < depth):
        raise ValueError(f"removed_layers must lie in [0, {depth}), got {outside[0]}: indices are zero-based")
    config = copy.deepcopy(encoder.config)
    setattr(config, next(name for name in DEPTHS if hasattr(config, name)), depth - len(removed))
    with torch.device("meta"):  # allocates nothing: every module is replaced by the original's
        pruned = type(encoder)(config)
    for name, module in encoder.named_children():
        setattr(pruned, name, module)
    pruned.layers = nn.ModuleList(layer for i, layer in enumerate(encoder.layers) if i not in removed)
    return pruned.train(encoder.training)


def with_repaired_maps(encoder: Any, maps: Mapping[str, Tensor]) -> Any:
    """A pruned encoder with some of its tensors replaced, by name; the layers that hold them are copied first.

    Raises ValueError for a tensor that the encoder does not have, or of another shape.
    """
    state = encoder.state_dict()
    if wrong := [name for name, tensor in maps.items() if name not in state or state[name].shape != tensor.shape]:
        raise ValueError(f"these maps belong to another encoder: {wrong[0]}")
    for place in sorted({int(name.split(".")[1]) for name in maps if name.startswith("layers.")}):
        encoder.layers[place] = copy.deepcopy(encoder.layers[place])
    encoder.load_state_dict(dict(maps), strict=False)
    return encoder


@contextmanager
def read_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what the module reads, each time that it is called in the context."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        hook.remove()
