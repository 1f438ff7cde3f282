"""The paper's run with rollouts sampled one iteration ahead, on half as many nodes again."""

from __future__ import annotations

from megatron_pmd.config import RunConfig, override
from recipes.qwen3_30b_a3b_dapo_32xh100 import qwen3_30b_a3b_dapo_32xh100


def qwen3_30b_a3b_overlap_48xh100() -> RunConfig:
    """Qwen3-30B-A3B-Base on DAPO-Math-17k: 2 nodes of 8 actor ranks, and 4 nodes with 2 engines each.

    Batch, objective and τ are the paper's. Engines share their GPUs with nothing but the groups of weight
    updates, so their cache may be larger.
    """
    settings = [
        "name=qwen3_30b_a3b_overlap_48xh100",
        "layout.data=4",
        "layout.engine_nodes=4",
        "rollout.placement=separate",
        "rollout.staleness=1",
        "rollout.ranks_per_engine=2",
        "sync.transport=broadcast",
        "rollout.sglang.mem_fraction_static=0.75",
    ]
    return override(qwen3_30b_a3b_dapo_32xh100(), settings)
