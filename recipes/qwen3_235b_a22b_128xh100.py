"""Qwen3-235B-A22B: a large mixture of experts on 16 nodes."""

from __future__ import annotations

from megatron_pmd.config import (
    Actor,
    Algorithm,
    Checkpoint,
    Layout,
    Model,
    Optimizer,
    Rollout,
    RunConfig,
    Sync,
)
from megatron_pmd.objectives.pmd import Pmd
from recipes.dapo import batch_of_the_paper, mathematics, mean_of_32, plus_minus_one


def qwen3_235b_a22b_128xh100() -> RunConfig:
    """Qwen3-235B-A22B on DAPO-Math-17k: 16 nodes of 8 H100.

    Pipeline stages of 12 layers but the last, which has 10 and the logits; an engine in FP8 fills a node.
    """
    return RunConfig(
        name="qwen3_235b_a22b_128xh100",
        iterations=100,
        model=Model(path="models/Qwen3-235B-A22B", precision="bf16"),
        layout=Layout(tensor=4, pipeline=8, expert=16, data=4),
        batch=batch_of_the_paper(max_tokens_per_microbatch=20480),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(
            recompute="full",
            timeout_seconds=3600,
            megatron={"num_layers_in_first_pipeline_stage": 12, "num_layers_in_last_pipeline_stage": 10},
        ),
        rollout=Rollout(
            tensor_parallel=8,
            max_running_requests=512,
            start_timeout_seconds=1800,
            request_timeout_seconds=7200,
            fp8=True,
            sglang={"ep_size": 8, "mem_fraction_static": 0.7},
        ),
        sync=Sync(bucket_megabytes=2048, timeout_seconds=900),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )
