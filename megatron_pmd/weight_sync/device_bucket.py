"""A bucket on the devices of a node, which engines open through CUDA IPC handles.

Every rank has a bucket on its own device, with what the engine's rank there reads, which alone opens it: no
process needs a context on another's device. Of torch it takes the same two functions that SGLang's own
updates take (torch/multiprocessing/reductions.py). The description is tested on a CPU; the handles need CUDA:
they ran on one H100 (docs/gpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_pmd.device import current_device
from megatron_pmd.weight_sync.bucket import Bucket

HANDLE_ARGUMENTS = 7
"""Of rebuild_cuda_tensor's arguments, the first that the sender decides; before them is what a bucket is."""


class DeviceBucket(Bucket):
    """A bucket in one rank's device memory, which that rank alone writes and one engine's rank reads.

    It lives for one update: between updates the memory is the engines'. An update that failed keeps it, so
    that an engine which has opened it, and one that was started again, both close it once: torch gives the
    memory back when its one reader has.
    """

    def __init__(self, key: str, capacity: int) -> None:
        super().__init__(key, capacity)
        self.data = torch.empty(self.capacity, dtype=torch.uint8, device=current_device())

    def handle(self) -> list[Any]:
        """What one process on the same device opens the bucket with, and closes it again; for JSON."""
        _, arguments = reductions.reduce_tensor(self.data)
        return [a.hex() if isinstance(a, bytes) else a for a in arguments[HANDLE_ARGUMENTS:]]

    def close(self) -> None:
        """Give the memory back to the device; once the reader has closed it."""
        self.data = torch.empty(0, dtype=torch.uint8)
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


def open_handle(handle: list[Any], nbytes: int) -> torch.Tensor:
    """The bytes of another process's bucket on this device; they are closed with the last view of them."""
    sent = [bytes.fromhex(a) if isinstance(a, str) else a for a in handle]
    described = (torch.Tensor, (nbytes,), (1,), 0, torch.UntypedStorage, torch.uint8, current_device().index)
    return reductions.rebuild_cuda_tensor(*described, *sent)
