"""A bucket on the devices of a node, which engines open through CUDA IPC handles.

Every rank has the whole bucket on its own device, where only the engine's rank that shares the device opens
it: no process needs a context on another's. Of torch it takes the same two functions that SGLang's own
updates take (torch/multiprocessing/reductions.py). The sum and the description are tested on a CPU; the
handles need CUDA: written, not run (docs/gpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from megatron_pmd.device import current_device
from megatron_pmd.weight_sync.bucket import Bucket
from megatron_pmd.weight_sync.bucket_layout import BucketLayout

HANDLE_ARGUMENTS = 7
"""Of rebuild_cuda_tensor's arguments, the first that the sender decides; before them is what a bucket is."""


class DeviceBucket(Bucket):
    """A bucket in every rank's device memory; all ranks of the node have the same after complete().

    It lives for one update: between updates the memory is the engines'. An update that failed keeps it, so
    that an engine which has opened it, and one that was started again, both close it once: torch gives the
    memory back when its one reader has.
    """

    def __init__(self, key: str, capacity: int, group: Any) -> None:
        """group: of the ranks of this node."""
        super().__init__(key, capacity)
        self._group = group
        self.data = torch.zeros(self.capacity, dtype=torch.uint8, device=current_device())

    def begin(self, layout: BucketLayout) -> None:
        super().begin(layout)
        self.data.zero_()  # what another rank writes must find nothing here

    def complete(self) -> None:
        """Make the bucket whole on every rank: no byte was written by two, so their sum is all of them."""
        words = self.data[: self.layout.used].view(torch.int64)
        dist.all_reduce(words, group=self._group)

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
