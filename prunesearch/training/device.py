"""The device to compute on, the precision, and the attention kernels."""

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
    """bf16 if the GPU or the processor computes in it, else fp32. Raises StudyError for bf16 on a device without it."""
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
    """Autocast to bf16 (trained weights stay fp32), unless the dtype is fp32; on a GPU, only attention kernels known to be
    right.
    """
    with contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        if device.type == "cuda":
            stack.enter_context(sdpa_kernel(CUDA_ATTENTION))
        yield


def attention_for_training(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention kernels for a forward pass with gradients. On a CPU, torch's flash attention is slower than matrix products."""
    if device.type == "cuda":
        return sdpa_kernel(CUDA_ATTENTION)
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak-memory counter of a GPU. The operating system's counter of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: of a GPU's allocator since the last reset; on a CPU, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
