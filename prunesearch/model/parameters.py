"""Parameter counts by group. They must sum to what the built modules hold."""

from typing import Any

from torch import nn

from prunesearch.model.llm import lora_parameters
from prunesearch.study.record import Parameters


def size_of(module: nn.Module) -> int:
    """The number of a module's parameters. Tied weights count once."""
    return sum(p.numel() for p in module.parameters())


def count_parameters(encoder: nn.Module, projector: nn.Module, model: Any) -> Parameters:
    """Counts of the built system. `model` is the LLM, with its LoRA if it has one. Tied weights count once."""
    lora = sum(p.numel() for p in lora_parameters(model).values())
    counts = Parameters(encoder=size_of(encoder), projector=size_of(projector), lora=lora, llm=size_of(model) - lora)
    assert counts.total == sum(p.numel() for p in nn.ModuleList([encoder, projector, model]).parameters())
    return counts
