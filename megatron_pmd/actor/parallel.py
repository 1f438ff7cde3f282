"""Process groups of the actor ranks: megatron-core's, and a gloo group for control."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_pmd.config import Layout
from megatron_pmd.errors import LayoutError, PmdError

T = TypeVar("T")


def initialize(layout: Layout, *, seed: int, timeout_seconds: float) -> None:
    """Join the job that torchrun started: NCCL with CUDA, gloo without; then megatron-core's groups.

    Raises LayoutError when the number of ranks is not the layout's.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    if world != layout.ranks:
        raise LayoutError(
            f"{world} ranks were started, but tensor={layout.tensor} x context={layout.context} x "
            f"pipeline={layout.pipeline} x data={layout.data} needs {layout.ranks}; "
            f"start {layout.ranks} ranks or change layout.data"
        )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    form_groups(layout, seed=seed, timeout_seconds=timeout_seconds)


def form_groups(layout: Layout, *, seed: int, timeout_seconds: float) -> None:
    """megatron-core's groups of the ranks that have joined, and its random states."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.experts_tensor,
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


class Control:
    """The ranks' way to wait for each other and to pass small Python objects, over gloo even on GPUs.

    A rank that waits here blocks in the kernel; it does not spin on the GPU as NCCL would.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        """The machine this rank runs on, as torchrun counts them."""

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(self._group)

    def from_driver(self, value: Any = None) -> Any:
        """The driver's value, on every rank."""
        box = [value]
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

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on the driver; None elsewhere."""
        values = [None] * self.world if self.is_driver else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values


def holds_logits() -> bool:
    """Whether this rank is the one of its replica that reports what the last pipeline stage computes."""
    return parallel_state.is_pipeline_last_stage() and is_first_of_stage()


def is_first_of_stage() -> bool:
    """Whether this rank is the first of those that share out a stage's tensors and sequences."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def data_parallel_position() -> tuple[int, int]:
    """(rank, size) among the replicas that share out the samples."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def context_parallel_position() -> tuple[int, int]:
    """(rank, size) among the ranks that share out the tokens of a sequence."""
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
