"""Kimi-K2: a trillion parameters on 64 nodes."""

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


def kimi_k2_1t_512xh100() -> RunConfig:
    """Kimi-K2-Base on DAPO-Math-17k: 64 nodes of 8 H100, the size that the K2 report trained on.

    Pipeline stages of 4 layers, 3 in the first, 2 in the last beside the logits, and expert 32, after
    Megatron-Bridge's recipe. An engine in FP8, as the model was published, spans 4 nodes,
    its attention data-parallel 8 ways.
    """
    return RunConfig(
        name="kimi_k2_1t_512xh100",
        iterations=100,
        model=Model(path="models/Kimi-K2-Base", precision="bf16"),
        layout=Layout(tensor=4, pipeline=16, expert=32, data=8),
        batch=batch_of_the_paper(max_tokens_per_microbatch=16384),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(
            recompute="full",
            timeout_seconds=3600,
            megatron={"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2},
        ),
        rollout=Rollout(
            tensor_parallel=32,
            max_running_requests=512,
            start_timeout_seconds=1800,
            request_timeout_seconds=7200,
            fp8=True,
            sglang={
                "enable_dp_attention": True,
                "dp_size": 8,
                "ep_size": 32,
                "moe_a2a_backend": "deepep",
                "moe_dense_tp_size": 1,
            },
        ),
        sync=Sync(bucket_megabytes=2048, timeout_seconds=900),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )
