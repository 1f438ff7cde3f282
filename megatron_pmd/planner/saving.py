"""A save: what it takes of the devices and the hosts while training stands still, and for how long.

megatron-core gathers Adam's states before it writes them (get_parameter_state_dp_zero of its
DistributedOptimizer). A rank then has those of all parameters in its part of the model, not of its share.
Muon's, of whole matrices, are written by the rank that has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.planner.hardware import Assumptions, Machines
from megatron_pmd.planner.shapes import Shape
from megatron_pmd.planner.sharding import BYTES, STATE_BYTES, Stage

BUCKET_PARAMETERS = 40_000_000
"""At which megatron-core's DistributedDataParallel closes a bucket, or a million a data-parallel rank."""


@dataclass(frozen=True)
class Save:
    """The fullest rank, and the fullest node of such ranks; bytes."""

    device_bytes: float
    """For what is gathered at one time: a bucket twice, and the rank's share of one; and moments in fp32 that
    are bf16 in memory."""
    gathered_bytes: float
    """On the node's ranks: the states of all parameters of each, in fp32."""
    copies_bytes: float
    """Beside them: either a bucket twice, as it comes and in one piece, with the rank's share; or what is
    written, which is copied out of the gathered states before those are given up."""
    written_bytes: float
    """What of it stays until it is on the disk."""
    copied_bytes: float
    """Written to memory by one rank while training stands still."""

    cores: int
    """That do it."""

    def stall_seconds(self, assume: Assumptions) -> float:
        return self.copied_bytes / self.cores / assume.core_copy_bytes_per_second


def save_of(shape: Shape, config: RunConfig, stage: Stage, machines: Machines, assume: Assumptions) -> Save:
    """The save of one pipeline stage.

    By devices every rank of a stage has the gathered states; by hosts the first data-parallel rank alone, for
    dense parameters and for experts.
    """
    layout, by_hosts = config.layout, config.hosts_gather_states
    whole = by_hosts or machines.shares_host_memory
    ranks = machines.ranks_per_node(config)
    per_stage = min(ranks, layout.ranks_per_stage)
    dense, experts = stage.trained_dense - stage.muon_dense, stage.trained_experts - stage.muon_experts
    fp8_dense, fp8_experts = (stage.fp8_dense, stage.fp8_experts) if stage.holds_fp8 else (0, 0)
    if layout.expert == 1:  # megatron-core then has experts in the dense parameters' buffers
        dense, experts, fp8_dense, fp8_experts = dense + experts, 0, fp8_dense + fp8_experts, 0
    weights_and_muons = stage.share * BYTES[config.model.precision] + stage.muon_share * stage.muon_bytes_each
    device = gathered = copies = 0.0
    written, copied = ranks * weights_and_muons, weights_and_muons
    for parameters, in_fp8, shards, first_replicas in (
        (dense, fp8_dense, stage.dense_shards, layout.tensor),
        (experts, fp8_experts, stage.expert_shards, layout.expert * layout.experts_tensor),
    ):
        holders = min(per_stage, first_replicas) if by_hosts else ranks
        buffer = max(in_fp8, parameters - in_fp8)  # those that are held in FP8 have one of their own
        bucket = buffer if whole else min(buffer, _bucket(shape, config, shards))
        share, states = bucket / shards, STATE_BYTES * parameters
        # NCCL gathers a bucket in one piece, which torch copies into the ranks' pieces of another; one
        # optimizer's are gone before the other's come
        on_device = 0.0 if by_hosts else 4 * (2 * bucket + share)
        device = max(device, on_device + _moments_in_fp32(shape, config, share))
        gathered += holders * states
        copies = max(copies, holders * 8 * bucket + ranks * STATE_BYTES * share)
        written += (holders if by_hosts else ranks / shards) * states
        # zeroed, received, put in one piece, put in place; the share zeroed, filled, and copied to be written
        copied += 4 * states + (3 * states / shards)
    at_a_device = 0.0 if machines.shares_host_memory else device
    cores = 1 if machines.shares_host_memory else assume.cores_per_rank
    return Save(at_a_device, gathered, max(copies, written), written, copied, cores)


def _moments_in_fp32(shape: Shape, config: RunConfig, share: float) -> float:
    """Bytes, beside a bucket that is gathered, of what bf16 moments become before: both moments of the
    parameter that was copied last, of which a rank has a share. It is taken for the largest."""
    if config.optimizer.moments == "fp32":
        return 0.0
    return 2 * BYTES["fp32"] * min(share, shape.embedding / config.layout.tensor)


def _bucket(shape: Shape, config: RunConfig, shards: int) -> float:
    """Parameters of the largest bucket: the parameter that fills one may be the largest."""
    return max(BUCKET_PARAMETERS, 1_000_000 * shards) + shape.embedding / config.layout.tensor
