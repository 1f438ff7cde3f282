"""Operations and time of each phase: rough, for comparing layouts and asking for a walltime."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.planner.hardware import Assumptions, Machines
from megatron_pmd.planner.memory import (
    Cache,
    checkpoint_bytes,
    engine_weight_bytes,
    microbatches_per_step,
)
from megatron_pmd.planner.saving import save_of
from megatron_pmd.planner.shapes import Shape
from megatron_pmd.planner.sharding import BYTES, Stage

CHECKPOINT = ("save", "write")
"""While training stands still, and to the disk: beside the phases that follow, if checkpoint.asynchronous."""


@dataclass(frozen=True)
class Cost:
    """One iteration."""

    tokens: float
    """Prompt and response tokens trained on, for mean lengths."""
    response_tokens: float
    forward_flops: float
    """Of one pass over them."""
    update_flops: float
    seconds: dict[str, float]
    """By phase."""

    @property
    def iteration_seconds(self) -> float:
        """Without the checkpoint, which is not due every time."""
        return sum(value for phase, value in self.seconds.items() if phase not in CHECKPOINT)


def forward_flops_per_token(shape: Shape, context: float) -> float:
    """Multiplications and additions of one token: 2 an active weight, and its scores with `context` others.

    The embedding is a look-up; the output matrix counts.
    """
    weights = shape.active - (0 if shape.tied_embeddings else shape.embedding)
    return 2 * weights + 2 * shape.layers * shape.attention.score_width * context


def cost(
    shape: Shape,
    config: RunConfig,
    all_stages: list[Stage],
    machines: Machines,
    kv: Cache,
    assume: Assumptions,
) -> Cost:
    """One iteration's operations and seconds."""
    batch, ranks, device = config.batch, config.layout.ranks, machines.device
    response = batch.max_response_tokens * assume.response_share
    length = batch.max_prompt_tokens / 2 + response
    tokens = batch.samples_per_rollout * length
    forward = tokens * forward_flops_per_token(shape, length / 2)
    update = forward * (4 if config.actor.recompute == "full" else 3)
    bubble = 1 + (config.layout.pipeline - 1) / config.layout.virtual_pipeline / microbatches_per_step(config)
    peak = ranks * (device.fp8_flops if config.actor.fp8 else device.bf16_flops)
    moved = max(stage.weight_bytes + stage.optimizer_bytes for stage in all_stages)
    nodes = -(-ranks // machines.devices_per_node)
    weight_bytes = shape.total * BYTES[config.model.precision]
    seconds = {
        "rollout": _rollout_seconds(shape, config, machines, kv, length, response, assume),
        "release": moved / device.host_bytes_per_second,
        "anchor": forward * bubble / peak / assume.forward_efficiency,
        "update": update * bubble / peak / assume.train_efficiency,
        "sync": weight_bytes / assume.sync_bytes_per_second + moved / device.host_bytes_per_second,
        "save": max(
            save_of(shape, config, stage, machines, assume).stall_seconds(assume) for stage in all_stages
        ),
        "write": checkpoint_bytes(shape, config) / nodes / machines.storage_bytes_per_second,
    }
    return Cost(tokens, batch.samples_per_rollout * response, forward, update, seconds)


def _rollout_seconds(
    shape: Shape,
    config: RunConfig,
    machines: Machines,
    kv: Cache,
    length: float,
    response: float,
    assume: Assumptions,
) -> float:
    """Decoding bound by memory: each step reads the engine's weights and the running requests' cache.

    With many requests every expert is read in every step.
    """
    if kv.running < 1:
        return float("inf")
    cached = kv.bytes_per_device / kv.tokens * length / 2 * kv.running if kv.tokens else 0.0
    device = machines.device
    read = (engine_weight_bytes(shape, config) + cached) / assume.decode_bandwidth_share
    flops = 2 * shape.active * kv.running / config.rollout.tensor_parallel
    step = max(read / device.memory_bytes_per_second, flops / device.bf16_flops)
    samples = config.batch.samples_per_rollout / config.engines
    return samples * response / kv.running * (step + assume.decode_overhead_seconds)
