"""The processes that train one candidate together: one, or as many as `accelerate launch` (torchrun, on CPUs) has started.

Every member runs the same code on the same candidate. Each works on its share of a batch, gradients are summed, and
what only one may do (decide, decode, write) the leader does.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prunesearch.study.interrupt import locked

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among its peers: its rank, how many they are, and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def assemble(cls) -> "ProcessGroup":
        """Join the processes that `accelerate launch` (torchrun, on CPUs) started; alone where it did not."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        state = PartialState(cpu=several and not torch.cuda.is_available())  # else accelerate takes each for alone
        device = state.device
        if device.type == "cuda" and device.index is None:  # threads begin on the first GPU, whatever the process chose
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batch: Sequence[T]) -> list[T]:
        """This member's part of a batch; all parts together are the batch."""
        return list(batch[self.rank :: self.size])

    def agree(self, value: T) -> T:
        """The leader's value."""
        if self.size == 1:
            return value
        return broadcast_object_list([value])[0]

    def lock(self, path: Path, check: Callable[[], None]) -> AbstractContextManager[object]:
        """A lock on a file against other teams, held by the leader while the others do as it does; `check` may end the wait."""
        return locked(path, check) if self.leads else nullcontext()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each gradient becomes the sum over the members; one that is missing counts as zero."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def least(self, value: int) -> int:
        """The smallest of the members' values."""
        if self.size == 1:
            return value
        whole = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MIN)
        return int(whole)

    def total(self, value: float) -> float:
        """The sum over the members."""
        if self.size == 1:
            return value
        whole = torch.tensor(value, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        torch.distributed.all_reduce(whole)
        return float(whole)
