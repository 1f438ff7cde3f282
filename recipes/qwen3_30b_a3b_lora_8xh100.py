"""LoRA on a mixture of experts: Qwen3-30B-A3B on one node, where its whole training state has no room."""

from __future__ import annotations

from megatron_pmd.config import RunConfig, override
from recipes.qwen3_30b_a3b_dapo_32xh100 import qwen3_30b_a3b_dapo_32xh100


def qwen3_30b_a3b_lora_8xh100() -> RunConfig:
    """Qwen3-30B-A3B-Base on DAPO-Math-17k: one node of 8 H100, two engines of four.

    The paper's algorithm with a quarter of its prompts. Adapters beside every linear layer of attention and
    of all experts, at ten times the learning rate of a training of all weights.
    """
    settings = [
        "name=qwen3_30b_a3b_lora_8xh100",
        "iterations=100",
        "layout.data=2",
        "batch.prompts_per_rollout=128",
        "batch.prompts_per_step=8",
        "actor.lora.rank=32",
        "actor.lora.alpha=64",
        "optimizer.learning_rate=1e-5",
    ]
    return override(qwen3_30b_a3b_dapo_32xh100(), settings)
