"""Generation with a limit for each row of a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria


class RowLimits(StoppingCriteria):
    """Each row of a batch ends at its own number of tokens."""

    def __init__(self, limits: Sequence[int], device: torch.device):
        self.limits = torch.tensor(limits, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        beams = input_ids.shape[0] // self.limits.shape[0]
        return input_ids.shape[1] >= self.limits.repeat_interleave(beams)
