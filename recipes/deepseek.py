"""What the recipes of the largest models share: DeepSeek-V3 and Kimi-K2, which has the same architecture."""

from __future__ import annotations

from typing import Any

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
    override,
)
from megatron_pmd.objectives.pmd import Pmd
from recipes.dapo import batch_of_the_paper, mathematics, mean_of_32, plus_minus_one


def on_dapo(
    name: str,
    *,
    model: str,
    pipeline: int,
    layers_first: int,
    layers_last: int,
    engine_ranks: int = 32,
    mem_fraction_static: float = 0.6,
) -> RunConfig:
    """A model of this family on DAPO-Math-17k: 32 ranks for each of `pipeline` stages, tensor 4, expert 32.

    An engine in FP8, as these models were published, spans 4 nodes or more; its attention is data-parallel,
    4 ranks each.

    layers_first, layers_last  layers of the first stage, and of the last beside the logits; the others share
                               out the rest evenly
    """
    attention_groups = engine_ranks // 4
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
            tensor_parallel=engine_ranks,
            max_running_requests=64 * attention_groups,
            start_timeout_seconds=1800,
            request_timeout_seconds=7200,
            fp8=True,
            sglang={
                "attn_dp_size": attention_groups,
                "ep_size": engine_ranks,
                "moe_a2a_backend": "deepep",
                "moe_dense_tp_size": 1,
                # max_running_requests over attn_dp_size: for larger graphs SGLang would reserve 20 GB more
                "cuda_graph_max_bs_decode": 64,
                "mem_fraction_static": mem_fraction_static,
            },
        ),
        sync=Sync(bucket_megabytes=2048, timeout_seconds=900),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )


def adapters_on_dapo(name: str, *, model: str, **engine: Any) -> RunConfig:
    """LoRA on a model of this family: 64 ranks in two stages, of 31 and 30 layers.

    A quarter of the paper's prompts. Adapters beside every linear layer that can have one, those of all
    experts included, at ten times the learning rate of a training of all weights.

    engine  on_dapo's engine_ranks and mem_fraction_static
    """
    settings = [
        "batch.prompts_per_rollout=128",
        "batch.prompts_per_step=8",
        "actor.lora.rank=16",
        "actor.lora.alpha=32",
        "optimizer.learning_rate=1e-5",
    ]
    all_weights = on_dapo(name, model=model, pipeline=2, layers_first=31, layers_last=30, **engine)
    return override(all_weights, settings)
