"""What the recipes of the largest models share: DeepSeek-V3 and Kimi-K2, which has the same architecture."""

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


def on_dapo(name: str, *, model: str, pipeline: int, layers_first: int, layers_last: int) -> RunConfig:
    """A model of this family on DAPO-Math-17k: 32 ranks for each of `pipeline` stages, tensor 4, expert 32.

    An engine in FP8, as these models were published, spans 4 nodes, its attention data-parallel 8 ways.

    layers_first, layers_last  layers of the first stage, and of the last beside the logits; the others share
                               out the rest evenly
    """
    stages = {
        "num_layers_in_first_pipeline_stage": layers_first,
        "num_layers_in_last_pipeline_stage": layers_last,
    }
    return RunConfig(
        name=name,
        iterations=100,
        model=Model(path=model, precision="bf16"),
        layout=Layout(tensor=4, pipeline=pipeline, expert=32, data=8),
        batch=batch_of_the_paper(max_tokens_per_microbatch=16384),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(recompute="full", timeout_seconds=3600, megatron=stages),
        rollout=Rollout(
            tensor_parallel=32,
            max_running_requests=512,
            start_timeout_seconds=1800,
            request_timeout_seconds=7200,
            fp8=True,
            sglang={
                "attn_dp_size": 8,
                "ep_size": 32,
                "moe_a2a_backend": "deepep",
                "moe_dense_tp_size": 1,
                # max_running_requests over attn_dp_size: for larger graphs SGLang would reserve 20 GB more
                "cuda_graph_max_bs_decode": 64,
                "mem_fraction_static": 0.6,
            },
        ),
        sync=Sync(bucket_megabytes=2048, timeout_seconds=900),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )
