"""A dense 7B model on one node: where to begin on a cluster."""

from __future__ import annotations

from megatron_pmd.config import (
    Actor,
    Algorithm,
    Batch,
    Checkpoint,
    Layout,
    Model,
    Optimizer,
    Rollout,
    RunConfig,
    Sync,
)
from megatron_pmd.objectives.pmd import Pmd
from recipes.dapo import mathematics, mean_of_32, plus_minus_one


def qwen2_5_7b_dapo_8xh100() -> RunConfig:
    """Qwen2.5-7B on DAPO-Math-17k: one node of 8 H100, four engines of two.

    The algorithm's settings are those of qwen3_30b_a3b_dapo_32xh100, with a quarter of its prompts and half
    its response length.
    """
    return RunConfig(
        name="qwen2_5_7b_dapo_8xh100",
        iterations=200,
        model=Model(path="models/Qwen2.5-7B", precision="bf16"),
        layout=Layout(tensor=2, data=4),
        batch=Batch(
            prompts_per_rollout=128,
            samples_per_prompt=16,
            prompts_per_step=16,
            max_tokens_per_microbatch=10240,
            max_prompt_tokens=2048,
            max_response_tokens=4096,
        ),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6, warmup_steps=10, weight_decay=0.01),
        actor=Actor(recompute="full", timeout_seconds=1800),
        rollout=Rollout(
            tensor_parallel=2,
            max_running_requests=256,
            request_timeout_seconds=3600,
            sglang={"mem_fraction_static": 0.7},
        ),
        sync=Sync(bucket_megabytes=1024),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )
