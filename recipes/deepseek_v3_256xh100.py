"""DeepSeek-V3: 671 billion parameters on 32 nodes."""

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


def deepseek_v3_256xh100() -> RunConfig:
    """DeepSeek-V3-Base on DAPO-Math-17k: 32 nodes of 8 H100.

    Pipeline stages of 8 layers, 7 in the first, 6 in the last beside the logits; expert 32 as in
    Megatron-Bridge's recipe for 32 nodes. An engine in FP8, as the model was published, spans 4 nodes, its
    attention data-parallel 8 ways.
    """
    return RunConfig(
        name="deepseek_v3_256xh100",
        iterations=100,
        model=Model(path="models/DeepSeek-V3-Base", precision="bf16"),
        layout=Layout(tensor=4, pipeline=8, expert=32, data=8),
        batch=batch_of_the_paper(max_tokens_per_microbatch=16384),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(
            recompute="full",
            timeout_seconds=3600,
            megatron={"num_layers_in_first_pipeline_stage": 7, "num_layers_in_last_pipeline_stage": 6},
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
