"""The cost of a training step, computed without a GPU: the step runs on tensors that have shapes and no data.

torch counts the operations (matrix products and attention, forward and backward). Bytes are counted by observing every tensor
that the step allocates, until it is freed. Nothing is computed and no weights are read, so a 3B model takes only seconds.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.model.system import Reader, SpeechEncoder, Target
from prunesearch.training.device import arithmetic
from prunesearch.training.finetune import trainable

CPU = torch.device("cpu")  # the device of the fake tensors; attention is fused there, as it is on a GPU


@dataclass(frozen=True)
class StepCost:
    """Operations of one step, how many calls (views aside) the host makes for them, and the peak of bytes on the device:
    the LLM's, projector's and LoRA's weights and the optimiser's state, with the tensors that the step allocates."""

    operations: int
    calls: int
    weight_bytes: int
    peak_bytes: int


class _AllocationCounter(TorchDispatchMode):
    """Counts calls, and the bytes of the tensors that are alive, now and at the peak."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.calls = self.now = self.peak = 0
        self._seen = {id(t.untyped_storage()) for t in known}

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls += not (func.is_view or func is torch.ops.prim.device.default)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def _without_data(*modules: nn.Module) -> list[Tensor]:
    """Give modules of the meta device tensors that pretend to be on a device; returns these. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in dict.fromkeys(m for root in modules for m in root.modules()):  # a part may belong to two of them
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return list(made.values())


def step_cost(reader: Reader, width: int, positions: int, text_tokens: int, batch: int, dtype: torch.dtype) -> StepCost:
    """A step of the fine-tune on `batch` utterances of so many encoder positions (of `width`) and text tokens each.

    The reader is made on the meta device, its language model in `dtype`, and cannot be used for anything else afterwards.
    """
    with FakeTensorMode():
        weights = _without_data(reader.model, reader.projector)
        reader.model.train()
        reader.projector.train()
        optimizer = torch.optim.AdamW(trainable(reader).values(), foreach=True)  # what it chooses on a GPU
        states = torch.empty(batch, positions, width, dtype=dtype)
        lengths = torch.full((batch,), positions)
        watch = _AllocationCounter([*weights, states])
        with watch, FlopCounterMode(display=False) as counter:
            with arithmetic(CPU, dtype):
                loss = reader.loss(states, lengths, [Target([0] * text_tokens)] * batch)
            loss.backward()
            optimizer.step()
    weight_bytes = sum(t.nbytes for t in weights)
    peak_bytes = weight_bytes + states.nbytes + watch.peak
    return StepCost(counter.get_total_flops(), watch.calls, weight_bytes, peak_bytes)


def encoding_operations(encoder: SpeechEncoder, positions: int) -> int:
    """Operations of the encoder's layers on one utterance; the encoder is made on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = torch.empty(1, positions, encoder.width, device="meta", dtype=encoder.module.dtype)
        encoder.run(hidden, torch.tensor([positions]))
    return counter.get_total_flops()
