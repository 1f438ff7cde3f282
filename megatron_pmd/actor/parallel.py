"""Process groups of the actor ranks: megatron-core's, and a gloo group for control."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_pmd.config import Layout
from megatron_pmd.errors import LayoutError
from megatron_pmd.waiting import waiting_for

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
    # Not also gloo with CUDA: every group that megatron-core forms would connect each of its ranks with each
    # other a second time, minutes at 512 ranks. What is on the host goes through Control's group, or through
    # the gloo groups that megatron-core forms of data-parallel ranks.
    backend, deadline = "nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds)
    if world == 1:  # torch's TCPStore would listen on all of the machine's addresses, for nobody
        dist.init_process_group(backend, timeout=deadline, store=dist.HashStore(), rank=0, world_size=1)
    else:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        all_ranks = f"all of the {world} ranks that torchrun speaks of (WORLD_SIZE) to come to {where}"
        with waiting_for(all_ranks, timeout_seconds):
            dist.init_process_group(backend, timeout=deadline)
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
