"""The study's unpruned system without weights, on the meta device: for counting parameters and operations before training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunesearch.model.families import family_of
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.record import Parameters

if TYPE_CHECKING:  # torch is imported only when a system is built
    from prunesearch.model.system import SpeechSystem


def skeleton(config: StudyConfig, dtype: Any = None) -> "SpeechSystem":
    """The study's unpruned system on the meta device, in `dtype` (default: fp32).

    Raises StudyError where a model's configuration cannot be read.
    """
    import torch

    return family_of(config).system().skeleton(config, dtype or torch.float32)


@dataclass(frozen=True)
class ParameterCounter:
    """Counts a candidate's parameters without building it: a candidate lacks whole layers, and LoRA grows with its rank."""

    unpruned: Parameters  # with a LoRA of rank 1
    layer_sizes: tuple[int, ...]

    def __call__(self, candidate: Candidate) -> Parameters:
        removed = sum(self.layer_sizes[i] for i in candidate.removed_layers)
        lora = self.unpruned.lora * candidate.lora_rank
        return self.unpruned.model_copy(update={"encoder": self.unpruned.encoder - removed, "lora": lora})

    def of(self, objective: str, candidate: Candidate) -> int:
        """The candidate's count that `objective` names: see `Parameters.of`."""
        return self(candidate).of(objective)


def params_of_candidates(config: StudyConfig) -> ParameterCounter:
    """Make the function from a candidate to its parameter counts. Raises StudyError where a configuration cannot be read."""
    system = skeleton(config)
    with system.reader(system.new_projector(0), 1) as reader:
        unpruned = system.parameters(system.encoder, reader)
    return ParameterCounter(unpruned, tuple(sum(p.numel() for p in layer.parameters()) for layer in system.encoder.layers))
