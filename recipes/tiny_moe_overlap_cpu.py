"""The mixture of experts of tiny_moe_cpu, sampled one iteration ahead by an engine that never waits."""

from __future__ import annotations

from megatron_pmd.config import Layout, RunConfig
from recipes.tiny_moe_cpu import tiny_moe_cpu


def tiny_moe_overlap_cpu() -> RunConfig:
    """One actor rank on one core, one engine on the other; both work all the time."""
    colocated = tiny_moe_cpu()
    rollout = colocated.rollout.model_copy(
        update={"placement": "separate", "staleness": 1, "ranks_per_engine": 1}
    )
    return RunConfig(
        **(dict(colocated) | {"name": "tiny_moe_overlap_cpu", "layout": Layout(), "rollout": rollout})
    )
