"""Responses of up to 128k tokens: Qwen3-30B-A3B-Thinking-2507, each sequence shared out over eight ranks."""

from __future__ import annotations

from megatron_pmd.config import RunConfig, override
from recipes.qwen3_30b_a3b_dapo_32xh100 import qwen3_30b_a3b_dapo_32xh100


def qwen3_30b_a3b_longcontext_64xh100() -> RunConfig:
    """DAPO-Math-17k on 8 nodes of 8 H100: 128 prompts x 16 responses, 4 optimizer steps a rollout, 2k + 128k.

    A pass over 163,840 tokens, 20,480 on each GPU, holds the longest sample and leaves room to balance.
    Requests wait in the engines' queues for most of a rollout, and their deadline counts that.
    """
    settings = [
        "name=qwen3_30b_a3b_longcontext_64xh100",
        # the base model has 32,768 positions, this one 262,144
        "model.path=models/Qwen3-30B-A3B-Thinking-2507",
        "layout.context=8",
        "layout.data=2",
        "batch.prompts_per_rollout=128",
        "batch.max_response_tokens=131072",
        "batch.max_tokens_per_microbatch=20480",
        "rollout.max_running_requests=64",
        "rollout.request_timeout_seconds=14400",
    ]
    return override(qwen3_30b_a3b_dapo_32xh100(), settings)
