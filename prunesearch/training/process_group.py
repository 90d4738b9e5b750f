"""The processes that train one candidate together: one, or as many as `accelerate launch` (or torchrun, on CPUs) has started.

Every process runs the same code on the same candidate. Each works on its shard of a batch, and gradients are summed. The main
process alone decides, decodes and writes; its decisions are broadcast.

The processes can leave together at any step. Within the training loop, they agree on it by a reduction at each step. Elsewhere
they are not at the same point: a process that has to leave says so in a key-value store that all of them poll, and a process
that waits for another polls it too. A wait of this kind never blocks in a collective, from which only a time-out would free it.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed import ReduceOp, TCPStore  # type: ignore[attr-defined]

from prunesearch.study.interrupt import Interrupted, LeaseLost, locked

T = TypeVar("T")

POLL_SECONDS = 0.05
STORE_CHECK_SECONDS = 0.5  # between two looks at the store while a process computes
LEAVE_SECONDS = 60.0  # for the others to notice that the processes leave


@dataclass
class _Channel:
    """The key-value store of the processes. Keys belong to a round; a round ends when the processes leave together."""

    store: TCPStore
    rank: int
    size: int
    round: int = 0
    messages: int = 0
    barriers: int = 0
    looked: float = 0.0

    @classmethod
    def open(cls, rank: int, size: int) -> "_Channel":
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=LEAVE_SECONDS)
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=timeout) if rank == 0 else None
        (port,) = broadcast_object_list([store.port if store else None])
        store = store or TCPStore(host, port, size, is_master=False, wait_for_workers=False, timeout=timeout)
        return cls(store, rank, size)

    def key(self, name: str) -> str:
        return f"{self.round}/{name}"

    def count(self, name: str, by: int) -> int:
        return int(self.store.add(self.key(name), by))

    def reason_to_leave(self) -> Exception | None:
        """What the first process that had to leave has said, if one has."""
        self.looked = time.monotonic()
        if not self.store.check([self.key("leave")]):
            return None
        kind, signal = pickle.loads(self.store.get(self.key("leave")))
        return LeaseLost() if kind == "lease" else Interrupted(signal)

    def leave(self, reason: Exception | None) -> Exception:
        """Announce the reason, wait until every process knows that they leave, begin a new round; returns the first reason.

        `reason`: None if only another process has one. It must not be announced before that other process's reason.
        """
        if reason is not None and self.count("leaving", 1) == 1:
            said = pickle.dumps(("lease" if isinstance(reason, LeaseLost) else "interrupt", getattr(reason, "signal", None)))
            self.store.set(self.key("leave"), said)  # type: ignore[arg-type]
        deadline = time.monotonic() + LEAVE_SECONDS
        while not (agreed := self.reason_to_leave()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.count("left", 1)
        self._wait_for("left", self.size, deadline)
        self.farewell(deadline)
        self.round, self.messages, self.barriers = self.round + 1, 0, 0
        return agreed or reason or Interrupted()

    def farewell(self, deadline: float) -> None:
        """Rank 0, whose process serves the store, goes last."""
        if self.rank > 0:
            self.count("farewell", 1)
        else:
            self._wait_for("farewell", self.size - 1, deadline)

    def _wait_for(self, name: str, number: int, deadline: float) -> None:
        while self.count(name, 0) < number and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


@dataclass
class ProcessGroup:
    """This process among its peers: its rank, their number, and the device that it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1
    check: Callable[[], None] = lambda: None  # raises Interrupted or LeaseLost for this process
    _channel: _Channel | None = field(default=None, repr=False)
    _announced: Exception | None = field(default=None, repr=False)
    _closed: _Channel | None = field(default=None, repr=False)

    @classmethod
    def join(cls) -> "ProcessGroup":
        """Join the processes that `accelerate launch` (or torchrun, on CPUs) started; a group of one without them."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        state = PartialState(cpu=several and not torch.cuda.is_available())  # without `cpu`, accelerate ignores the others
        device, rank, size = state.device, state.process_index, state.num_processes
        if device.type == "cuda" and device.index is None:  # threads start on the first GPU, whatever this process chose
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, rank, size, _channel=_Channel.open(rank, size) if size > 1 else None)

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    # Leaving together

    def check_anywhere(self) -> None:
        """Raises Interrupted or LeaseLost if this process or another one has to leave. For code that processes run on their
        own.
        """
        if self._channel is None:
            self.check()
            return
        try:
            self.check()
        except (Interrupted, LeaseLost) as reason:
            self.leave(reason)
        if time.monotonic() - self._channel.looked > STORE_CHECK_SECONDS:
            self._leave_if_told()

    def check_step(self) -> None:
        """The same for code that all processes run in step: all of them raise at the same call."""
        if self._channel is None:
            self.check()
            return
        reason: Exception | None = None
        try:
            self.check()
        except (Interrupted, LeaseLost) as error:
            reason = error
        if self._reduced(int(reason is not None), ReduceOp.MAX):
            self._leave_for(self._channel, reason)

    def leave(self, reason: Exception) -> NoReturn:
        """Raise the reason in all processes: Interrupted or LeaseLost. A reason that was announced before is only raised."""
        if self._channel is None or reason is self._announced:
            raise reason
        self._leave_for(self._channel, reason)

    def _leave_for(self, channel: _Channel, reason: Exception | None) -> NoReturn:
        self._announced = channel.leave(reason)
        raise self._announced

    def _leave_if_told(self) -> None:
        if self._channel and (reason := self._channel.reason_to_leave()):
            self.leave(reason)

    def disband(self) -> None:
        """All processes call this when nothing is left to do together. Afterwards, each is on its own."""
        if self._channel is not None:
            self._channel.farewell(time.monotonic() + LEAVE_SECONDS)
            self._closed, self._channel = self._channel, None  # the store must outlive the others' last look

    # Agreeing

    def broadcast(self, value: T) -> T:
        """The main process's value. Raises Interrupted or LeaseLost while it waits."""
        if self._channel is None:
            return value
        self._channel.messages += 1
        key = self._channel.key(f"message {self._channel.messages}")
        if self.is_main_process:
            self._channel.store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
            return value
        while not self._channel.store.check([key]):
            self.check_anywhere()
            time.sleep(POLL_SECONDS)
        received: T = pickle.loads(self._channel.store.get(key))
        if self._channel.count(f"{key} read", 1) == self.size - 1:
            self._channel.store.delete_key(key)
        return received

    def wait_for_all(self) -> None:
        """Return when all processes have come here. Raises Interrupted or LeaseLost while it waits."""
        if self._channel is None:
            return
        self._channel.barriers += 1
        name = f"barrier {self._channel.barriers}"
        self._channel.count(name, 1)
        while self._channel.count(name, 0) < self.size:
            self.check_anywhere()
            time.sleep(POLL_SECONDS)

    def lock(self, path: Path) -> AbstractContextManager[object]:
        """A lock on a file against other groups. Only the main process takes it; the others run the same code under it."""
        return locked(path, self.check_anywhere) if self.is_main_process else nullcontext()

    # Training together

    def shard(self, batch: Sequence[T]) -> list[T]:
        """This process's part of a batch; all parts together are the batch."""
        return list(batch[self.rank :: self.size])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; a missing gradient counts as zero."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def least(self, value: int) -> int:
        """The minimum over the processes."""
        return value if self.size == 1 else self._reduced(value, ReduceOp.MIN)

    def any(self, condition: bool) -> bool:
        """Whether the condition holds in one of the processes."""
        return condition if self.size == 1 else bool(self._reduced(int(condition), ReduceOp.MAX))

    def total(self, value: float) -> float:
        """The sum over the processes."""
        if self.size == 1:
            return value
        whole = torch.tensor(value, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        torch.distributed.all_reduce(whole)
        return float(whole)

    def _reduced(self, value: int, operation: "ReduceOp.RedOpType") -> int:
        whole = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(whole, operation)
        return int(whole)
