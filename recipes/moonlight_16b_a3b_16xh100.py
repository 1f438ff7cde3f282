"""The smallest public model of the DeepSeek-V3 family: latent attention, shared experts."""

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


def moonlight_16b_a3b_16xh100() -> RunConfig:
    """Moonlight-16B-A3B on DAPO-Math-17k: 2 nodes of 8 H100.

    Tensor 2 and expert 8 as in Megatron-Bridge's recipe. The model was
    made for 8k positions: 1k of prompt and 7k of response fill them.
    The optimizer is Muon, as in the model's own training.
    """
    return RunConfig(
        name="moonlight_16b_a3b_16xh100",
        iterations=100,
        model=Model(path="models/Moonlight-16B-A3B", precision="bf16"),
        layout=Layout(tensor=2, expert=8, data=8),
        batch=Batch(
            prompts_per_rollout=512,
            samples_per_prompt=16,
            prompts_per_step=32,
            max_tokens_per_microbatch=16384,
            max_prompt_tokens=1024,
            max_response_tokens=7168,
        ),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(name="muon", learning_rate=1e-6),
        actor=Actor(
            recompute="full",
            timeout_seconds=3600,
        ),
        rollout=Rollout(
            tensor_parallel=2,
            max_running_requests=256,
            start_timeout_seconds=1800,
            request_timeout_seconds=7200,
            sglang={"mem_fraction_static": 0.7},
        ),
        sync=Sync(bucket_megabytes=1024, timeout_seconds=900),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=10),
    )
