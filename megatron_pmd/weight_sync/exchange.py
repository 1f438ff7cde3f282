"""Messages between the ranks of a run, for the weights of an update and their checksums.

They have a process group of their own. NCCL makes a communicator at its first use, by all of its ranks;
batch_isend_irecv is called by those alone that have something to send. So the group is used once by all when
it is made, and nothing else shares its deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_pmd.device import current_device
from megatron_pmd.distributed import Control
from megatron_pmd.waiting import waiting_for
from megatron_pmd.weight_sync.bucket_layout import padded
from megatron_pmd.weight_sync.plan import Region, message_bytes


class Exchange:
    """Collective: every rank makes it and calls add_up(), in the same order; swap() is called by pairs."""

    def __init__(self, control: Control, timeout_seconds: float) -> None:
        """timeout_seconds: a rank waits so long at most, in one call, for those that have to take part."""
        self._group: Any = None
        self._timeout_seconds = timeout_seconds
        if control.world > 1:
            self._group = dist.new_group(
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
            )
        self.add_up(torch.zeros(1, dtype=torch.int64, device=current_device()))

    def add_up(self, values: torch.Tensor) -> list[int]:
        """Of every rank's values the sums, modulo 2^64, as signed numbers; values: int64 [any number]."""
        if self._group is not None:
            with self._waiting("the sums of a weight bucket from the other ranks"):
                dist.all_reduce(values, group=self._group)
        return values.tolist()

    def swap(
        self, outgoing: Sequence[tuple[int, torch.Tensor]], incoming: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Send messages (rank, bytes) and receive others (rank, size in bytes), all at once."""
        came = [torch.empty(size, dtype=torch.uint8, device=current_device()) for _, size in incoming]
        operations = [dist.P2POp(dist.isend, data, rank, self._group) for rank, data in outgoing]
        operations += [
            dist.P2POp(dist.irecv, data, rank, self._group)
            for (rank, _), data in zip(incoming, came, strict=True)
        ]
        ranks = sorted({rank for rank, _ in (*outgoing, *incoming)})
        with self._waiting(f"weights to and from ranks {', '.join(map(str, ranks))}"):
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
        return came

    def _waiting(self, what: str) -> AbstractContextManager[None]:
        return waiting_for(f"{what}, in a sync", self._timeout_seconds)


def packed(regions: Sequence[Region], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One message of these regions' values: uint8 [bytes]."""
    message = torch.empty(message_bytes(regions), dtype=torch.uint8, device=current_device())
    at = 0
    for region, part in zip(regions, parts, strict=True):
        message[at : at + region.nbytes].view(part.dtype).view(part.shape).copy_(part)
        at += padded(region.nbytes)
    return message


def unpacked(regions: Sequence[Region], message: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of packed: views of the message, each of its region's dtype and shape."""
    parts, at = [], 0
    for region in regions:
        data = message[at : at + region.nbytes].view(getattr(torch, region.dtype))
        parts.append(data.view(region.local_shape))
        at += padded(region.nbytes)
    return parts
