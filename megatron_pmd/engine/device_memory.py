"""Whether what an engine says it released has reached the device that it shares with an actor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_pmd.errors import EngineError

POLL_SECONDS = 0.05
SLACK = 0.05
"""Share of a promise that may be missing: allocators round, and keep a little."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device."""

    free: int
    actor: int
    """Held by this process."""
    total: int

    @property
    def others(self) -> int:
        """Held by all other processes: the engine's, where nothing else runs on the device."""
        return self.total - self.free - self.actor


def device_memory() -> DeviceMemory:
    """Of this rank's CUDA device. Written, not run: a CPU frees nothing on release."""
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(free=free, actor=torch.cuda.memory_reserved(), total=total)


def wait_freed(
    measure: Callable[[], DeviceMemory],
    before: DeviceMemory,
    promised: int,
    *,
    what: str,
    deadline_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> DeviceMemory:
    """Wait until as much more is free as a release promised; returns what the device then holds.

    before    measured before the release
    promised  bytes
    what      engine and kind of memory, for the message
    Raises EngineError at the deadline, with both sides' memory.
    """
    limit = clock() + deadline_seconds
    while True:
        now = measure()
        freed = now.free - before.free
        if freed >= promised * (1 - SLACK):
            return now
        if clock() >= limit:
            raise EngineError(
                f"{what}: {freed / 1e9:.2f} of {promised / 1e9:.2f} GB were freed {deadline_seconds:g} s "
                f"after the release. The device has {now.total / 1e9:.2f} GB: the actor holds "
                f"{now.actor / 1e9:.2f}, the engine {now.others / 1e9:.2f} "
                f"({before.others / 1e9:.2f} before), {now.free / 1e9:.2f} are free"
            )
        sleep(POLL_SECONDS)
