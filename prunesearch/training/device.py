"""Where and how precisely to compute."""

import contextlib
import platform
import random
import resource
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunesearch.study.errors import StudyError


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where the GPU or the processor computes in it, else fp32. Raises StudyError for a bf16 that is not there."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        has_bf16 = device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
    if precision == "bf16" and not has_bf16:
        raise StudyError([f'training.precision: "bf16" is not supported by this {device.type}; "auto" or "fp32" is'])
    return torch.bfloat16 if has_bf16 and precision != "fp32" else torch.float32


# Not cuDNN's: on an H100 it gave NaN gradients for Gemma 3 (heads of 256) under a padding mask, always at the same step.
CUDA_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextlib.contextmanager
def arithmetic(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """bf16 arithmetic for trained weights that stay fp32, nothing where the dtype is fp32; and kernels that can be trusted."""
    with contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        if device.type == "cuda":
            stack.enter_context(sdpa_kernel(CUDA_ATTENTION))
        yield


def attention_for_training(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The kernels that a backward pass may go through. On a CPU, torch's flash attention takes longer than matrix products."""
    if device.type == "cuda":
        return sdpa_kernel(CUDA_ATTENTION)
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def forget_peak_memory(device: torch.device) -> None:
    """What was held at most is counted anew from here. Of a process, the system keeps one count that cannot be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that a GPU's allocator has held since the peak was last forgotten, or, on a CPU, the process ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
