"""Parameter counts by group. They must sum to what the built modules hold."""

from typing import Any

from torch import nn

from prunesearch.model.llm import lora_parameters
from prunesearch.study.record import Parameters


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_parameters(encoder: nn.Module, projector: nn.Module, model: Any) -> Parameters:
    """Counts of the built system. `model` is the LLM, with its LoRA if it has one. Tied weights count once."""
    lora = sum(p.numel() for p in lora_parameters(model).values())
    counts = Parameters(encoder=_size(encoder), projector=_size(projector), lora=lora, llm=_size(model) - lora)
    assert counts.total == sum(p.numel() for p in nn.ModuleList([encoder, projector, model]).parameters())
    return counts
