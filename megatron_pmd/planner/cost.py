"""Operations and time of each phase: rough, for comparing layouts and asking for a walltime."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.placement import sampled_by
from megatron_pmd.planner.hardware import Assumptions, Machines
from megatron_pmd.planner.memory import (
    Cache,
    checkpoint_bytes,
    engine_weight_bytes,
    mean_length,
    mean_response,
    microbatches_per_step,
    transferred_bytes,
)
from megatron_pmd.planner.saving import save_of
from megatron_pmd.planner.shapes import Shape
from megatron_pmd.planner.sharding import Stage

CHECKPOINT = ("save", "write")
"""While training stands still, and to the disk: beside the phases that follow, if checkpoint.asynchronous."""


@dataclass(frozen=True)
class Cost:
    """One iteration."""

    tokens: float
    """Prompt and response tokens trained on, for mean lengths."""
    response_tokens: float
    anchor_flops: float
    update_flops: float
    seconds: dict[str, float]
    """By phase; without `rollout` where servers of others sample, of which nothing is known."""

    @property
    def iteration_seconds(self) -> float:
        """Without the checkpoint, which is not due every time."""
        return sum(value for phase, value in self.seconds.items() if phase not in CHECKPOINT)


def forward_flops_per_token(shape: Shape, context: float) -> float:
    """Multiplications and additions of one token: 2 an active weight, and its scores with `context` others.

    The embedding is a look-up; the output matrix counts. The state of linear attention is as wide whatever
    the context; the few operations on it are left out.
    """
    weights = shape.active - (0 if shape.embeddings.tied else shape.embedding)
    return 2 * weights + 2 * shape.caching_layers * shape.attention.score_width * context


def cost(
    shape: Shape,
    config: RunConfig,
    all_stages: list[Stage],
    machines: Machines,
    kv: Cache,
    assume: Assumptions,
    *,
    replay: bool,
) -> Cost:
    """One iteration's operations and seconds."""
    sampler = sampled_by(config, replay=replay)
    batch, ranks, device = config.batch, config.layout.ranks, machines.device
    response, length = mean_response(config, assume), mean_length(config, assume)
    tokens = batch.samples_per_rollout * length
    forward = tokens * forward_flops_per_token(shape, length / 2)
    anchor = forward * anchor_share(config)
    update = forward * (4 if config.actor.recompute == "full" else 3)
    bubble = 1 + (config.layout.pipeline - 1) / config.layout.virtual_pipeline / microbatches_per_step(config)
    peak = ranks * (device.fp8_flops if config.actor.fp8 else device.bf16_flops)
    moved = max(stage.weight_bytes + stage.optimizer_bytes for stage in all_stages)
    if config.rollout.placement == "separate":
        moved = 0.0  # nothing leaves its device for the engines
    sampling = {"rollout": 0.0} if sampler is None else {}
    if sampler == "engines":
        sampling = {"rollout": rollout_seconds(shape, config, machines, kv, config.engines, assume)}
    taken = 0.0 if sampler is None else transfer_seconds(shape, config, assume)
    seconds = sampling | {
        "release": moved / device.host_bytes_per_second,
        "anchor": anchor * bubble / peak / assume.forward_efficiency,
        "update": update * bubble / peak / assume.train_efficiency,
        "sync": taken + moved / device.host_bytes_per_second,
        "save": max(
            save_of(shape, config, stage, machines, assume).stall_seconds(assume) for stage in all_stages
        ),
        "write": checkpoint_bytes(shape, config)
        / machines.rank_nodes(config)
        / machines.storage_bytes_per_second,
    }
    return Cost(tokens, batch.samples_per_rollout * response, anchor, update, seconds)


def anchor_share(config: RunConfig) -> float:
    """Of a rollout's tokens, those whose log π_t the actor computes: with the engines' as anchor it compares
    those of the first step alone."""
    if config.algorithm.objective.supervised:
        return 0.0
    return 1 / config.batch.steps_per_rollout if config.algorithm.anchor == "engine" else 1.0


def transfer_seconds(shape: Shape, config: RunConfig, assume: Assumptions) -> float:
    """In which all weights pass from the actors to the engines, without what else moves in a sync."""
    return transferred_bytes(shape, config) / assume.sync_bytes_per_second


def decode_step_seconds(
    shape: Shape, config: RunConfig, machines: Machines, kv: Cache, running: int, assume: Assumptions
) -> float:
    """In which an engine adds one token to each of so many running requests of mean length.

    Decoding is bound by memory: a step reads the engine's weights and the running requests' cache. With many
    requests every expert is read in every step.
    """
    length = mean_length(config, assume)
    cached = kv.bytes_per_device / kv.tokens * length / 2 * running if kv.tokens else 0.0
    device = machines.device
    read = (engine_weight_bytes(shape, config) + cached) / assume.decode_bandwidth_share
    flops = 2 * shape.active * running / config.rollout.tensor_parallel
    peak = device.fp8_flops if config.rollout.fp8 else device.bf16_flops
    return max(read / device.memory_bytes_per_second, flops / peak) + assume.decode_overhead_seconds


def rollout_seconds(
    shape: Shape, config: RunConfig, machines: Machines, kv: Cache, engines: int, assume: Assumptions
) -> float:
    """In which so many engines decode a rollout's tokens, each with as many requests as it may run."""
    samples = config.batch.samples_per_rollout / engines
    running = min(kv.slots, math.ceil(samples))
    if running < 1:
        return math.inf
    step = decode_step_seconds(shape, config, machines, kv, running, assume)
    return samples * mean_response(config, assume) / running * step
