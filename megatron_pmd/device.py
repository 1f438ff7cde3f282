"""The device a rank computes on; what actor and engines hold of it, and what may be there at one time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_pmd.errors import DeviceFull

Part = Literal["parameters", "optimizer", "weights", "kv_cache"]
"""`parameters` (with their gradients) and `optimizer` are the actor's, the others the engine's."""
APART: tuple[tuple[Part, Part], ...] = (
    ("optimizer", "weights"),
    ("optimizer", "kv_cache"),
    ("parameters", "kv_cache"),
)
"""What is never brought together. In a sync the parameters are beside the engine's weights."""


def current_device() -> torch.device:
    """The CUDA device that this rank computes on; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_device(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The host's values on the device; the host goes on before they are there."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()  # of other memory the driver waits for what the device still has to do
    return values.to(device, non_blocking=True)


class SharedDevice:
    """A rank's account of its device, by what the actor and the engines were told to hold.

    Not checked is what begins to exist: at a run's start on a CPU, an engine with its cache is beside the
    actor until it is released.
    """

    def __init__(self) -> None:
        self.held: set[Part] = set()

    def take(self, *parts: Part) -> None:
        """To be called before these come. RuntimeError if something is there that has to leave first."""
        for pair in APART:
            for part, other in (pair, pair[::-1]):
                if part in parts and other in self.held:
                    raise RuntimeError(
                        f"{part} would come to a device that {other} has not left: wrong order of phases"
                    )
        self.held |= set(parts)

    def leave(self, *parts: Part) -> None:
        """To be called when these have left the device."""
        self.held -= set(parts)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device."""

    free: int
    actor: int
    """In blocks of this process's torch allocator."""
    total: int
    tensors: int = 0
    """Of those blocks: in use."""

    @property
    def others(self) -> int:
        """What is not in this process's allocator: the engine's, and what CUDA and NCCL hold for this process
        beside it; nothing else runs on the device."""
        return self.total - self.free - self.actor


def device_memory() -> DeviceMemory:
    """Of this rank's CUDA device; a CPU frees nothing on release."""
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(free, torch.cuda.memory_reserved(), total, torch.cuda.memory_allocated())


def describe_left_overs(ranks: Sequence[DeviceMemory]) -> str:
    """What stays on the fullest device while neither actor nor engine has anything there that it can release.

    ranks: each rank's, measured at that moment.
    """
    fullest = min(range(len(ranks)), key=lambda rank: ranks[rank].free)
    memory = ranks[fullest]
    return (
        f"released by all, the fullest device (rank {fullest}) still holds "
        f"{(memory.total - memory.free) / 1e9:.1f} GB: {memory.others / 1e9:.1f} GB of CUDA contexts, NCCL's "
        f"buffers and CUDA graphs, {(memory.actor - memory.tensors) / 1e9:.1f} GB of freed blocks and "
        f"{memory.tensors / 1e9:.1f} GB of tensors in the rank's allocator; compare with `megatron-pmd plan`"
    )


@contextmanager
def saying_who_fills_it(phase: str) -> Iterator[None]:
    """Raises DeviceFull for an allocation within it that the device has no room for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        memory = device_memory()
        raise DeviceFull(
            f"{phase}: of the {memory.total / 1e9:.1f} GB of {current_device()}, "
            f"{memory.tensors / 1e9:.1f} GB are tensors of this rank, "
            f"{(memory.actor - memory.tensors) / 1e9:.1f} GB freed blocks of its allocator, "
            f"{memory.others / 1e9:.1f} GB an engine's, NCCL's and others'; lower "
            "batch.max_tokens_per_microbatch (or, in a sync, sync.bucket_megabytes), or set "
            "actor.recompute=full, optimizer.offload=1 or a larger layout; `megatron-pmd plan` counts each "
            f"phase. torch said: {str(error).partition('. GPU')[0]}"
        ) from error
