"""What of the actor is in device memory, and when: the engines live on the same devices.

On a CPU there is one memory: leaving it means handing freed pages back to the system, where the engines find
them. The CUDA half calls megatron-core's own offloading; it is written, not run (docs/gpu.md). Parameters
have one pinned copy on the host, made the first time; the optimizer's states go to pageable memory, made anew
each time.
"""

from __future__ import annotations

import ctypes
from typing import Any

import psutil
import torch


def resident_bytes() -> int:
    """What this rank holds: of its device, and of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return psutil.Process().memory_info().rss


def return_freed_memory() -> None:
    """Hand back what the allocator keeps although nothing uses it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        # glibc keeps what a step freed: 2.7 GB for a model of 135 million parameters
        ctypes.CDLL(None).malloc_trim(0)


def release_optimizer(optimizer: Any) -> None:
    """After the last optimizer step of an iteration: its states leave before the weights are exported."""
    if torch.cuda.is_available():
        optimizer.offload_to_cpu()
    return_freed_memory()


def release_parameters(chunks: list[Any]) -> None:
    """After the export: parameters and gradient buffers leave, and the device belongs to the engines."""
    if torch.cuda.is_available():
        for buffer in _buffers(chunks):
            buffer.offload_to_cpu(move_params=True, move_grads=True)
        return_freed_memory()


def wake_parameters(chunks: list[Any]) -> None:
    """Parameters back on the device, without their gradients."""
    if torch.cuda.is_available():
        for buffer in _buffers(chunks):
            buffer.reload_from_cpu(move_params=True, move_grads=False)


def _buffers(chunks: list[Any]) -> list[Any]:
    return [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def wake(chunks: list[Any], optimizer: Any) -> None:
    """Everything back on the device, after the engines have released it."""
    if torch.cuda.is_available():
        for buffer in _buffers(chunks):
            buffer.reload_from_cpu(move_params=True, move_grads=True)
        optimizer.restore_from_cpu()
