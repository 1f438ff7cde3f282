"""The mixture of experts of tiny_moe_cpu, sampled one iteration ahead by an engine that never waits."""

from __future__ import annotations

from megatron_pmd.config import Layout, RunConfig
from recipes.tiny_moe_cpu import tiny_moe_cpu


def tiny_moe_overlap_cpu() -> RunConfig:
    """One actor rank on one core, one engine on the other; both work all the time.

    A quarter more iterations than tiny_moe_cpu: every rollout is of the weights before.
    """
    colocated = tiny_moe_cpu()
    apart = {"placement": "separate", "staleness": 1, "ranks_per_engine": 1}
    rollout = colocated.rollout.model_copy(update=apart)
    changes = {"name": "tiny_moe_overlap_cpu", "iterations": 50, "layout": Layout(), "rollout": rollout}
    return RunConfig(**(dict(colocated) | changes))
