"""torch.cuda answers as on a node of eight H100, for code that only decides: nothing computes here.

What really needs a device still fails, with CUDA's own error: nothing of a driver is played.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DEVICES = 8


@dataclass(frozen=True)
class Properties:
    """What cudaGetDeviceProperties says of an H100 SXM with 80 GB."""

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    total_memory: int = 85_017_624_576
    multi_processor_count: int = 132
    warp_size: int = 32
    shared_memory_per_block: int = 49_152
    shared_memory_per_block_optin: int = 232_448
    shared_memory_per_multiprocessor: int = 233_472
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65_536
    L2_cache_size: int = 52_428_800
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    gcnArchName: str = ""
    uuid: str = "GPU-0"
    pci_bus_id: int = 0


H100 = Properties()
NVIDIA_SMI = """#!/bin/sh
case "$*" in
*memory.total*) for i in 0 1 2 3 4 5 6 7; do echo 81559; done ;;
*compute_cap*) echo 9.0 ;;
*driver_version*) echo 580.95.05 ;;
*) exit 9 ;;
esac
"""
"""SGLang asks this program for a device's memory (srt/utils/common.py, get_nvgpu_memory_capacity)."""


class Nothing:
    """A stream or an event, which nothing waits for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def pretend() -> None:
    """From here on torch.cuda answers so in this process; before anything else of the stack is imported."""
    generators = tuple(torch.Generator() for _ in range(DEVICES))
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "is_initialized": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: H100.name,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_arch_list": lambda: ["sm_90"],
        "mem_get_info": lambda device=None: (84_000_000_000, H100.total_memory),
        "memory_allocated": lambda device=None: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "default_generators": generators,
        "get_rng_state": lambda device="cuda": generators[0].get_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "Stream": Nothing,
        "Event": Nothing,
        "current_stream": Nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


@contextmanager
def compute_capability(major: int, minor: int) -> Iterator[None]:
    """Another generation of devices."""
    before = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = before
