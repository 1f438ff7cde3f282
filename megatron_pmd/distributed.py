"""How the ranks of a run wait for each other and pass small objects, apart from Megatron's groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_pmd.errors import PmdError
from megatron_pmd.heartbeat import Heartbeat
from megatron_pmd.waiting import waiting_for

T = TypeVar("T")
PIECE_BYTES = 2**28
"""Of bulk data, in one message: each has a deadline of its own."""


class Control:
    """The ranks' way to wait for each other and to pass small Python objects, over gloo even on GPUs.

    A rank that waits here blocks in the kernel; it does not spin on the GPU as NCCL would.
    """

    def __init__(self, timeout_seconds: float, heartbeat: Heartbeat | None = None) -> None:
        """heartbeat: says of this rank when it waits here for others."""
        self.heartbeat, self._timeout_seconds = heartbeat or Heartbeat(), timeout_seconds
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        """The machine this rank runs on, as torchrun counts them."""

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a collective; on the driver it is told. The others wait for the driver in every rollout."""
        others, place = f"the other {self.world - 1} ranks", f", in {self.heartbeat.place}"
        told = waiting_for(others, self._timeout_seconds, remark=place) if self.is_driver else nullcontext()
        with self.heartbeat.waiting(), told:
            yield

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        with self._waiting():
            dist.barrier(self._group)

    def from_driver(self, value: Any = None) -> Any:
        """The driver's value, on every rank."""
        box = [value]
        with self._waiting():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def on_driver(self, action: Callable[[], T]) -> T | None:
        """The action's result on the driver, None elsewhere; a PmdError in it is raised on every rank."""
        result, failure = None, None
        if self.is_driver:
            try:
                result = action()
            except PmdError as error:
                failure = error
        failure = self.from_driver(failure)
        if failure is not None:
            raise failure
        return result

    def send_bytes(self, data: torch.Tensor, rank: int) -> None:
        """Bulk data to another rank, as it lies in memory; that rank calls receive_bytes meanwhile.

        data: uint8 [bytes], contiguous.
        """
        with self._waiting():
            for piece in data.split(PIECE_BYTES):
                dist.send(piece, rank, group=self._group)

    def receive_bytes(self, data: torch.Tensor, rank: int) -> None:
        """Fill data, uint8 [bytes], contiguous, with as many bytes that the other rank sends."""
        with self._waiting():
            for piece in data.split(PIECE_BYTES):
                dist.recv(piece, rank, group=self._group)

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run the action on every rank; all get all results, in rank order, or the first rank's PmdError.

        A rank that failed would not come to the next collective, and the others would wait for it for ever.
        """
        outcome: tuple[T | None, PmdError | None]
        try:
            outcome = (action(), None)
        except PmdError as error:
            outcome = (None, error)
        outcomes: list[tuple[T, PmdError | None]] = self.all_gather(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on the driver; None elsewhere."""
        values = [None] * self.world if self.is_driver else None
        with self._waiting():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return values
