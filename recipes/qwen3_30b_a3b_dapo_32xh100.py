"""The paper's run (arXiv 2602.05933): Qwen3-30B-A3B-Base on DAPO-Math-17k by PMD-mean, both values of τ."""

from __future__ import annotations

from typing import Any

from megatron_pmd.config import (
    Actor,
    Algorithm,
    Checkpoint,
    Fp8,
    Layout,
    Model,
    Optimizer,
    Rollout,
    RunConfig,
    Sync,
)
from megatron_pmd.objectives.pmd import Pmd
from recipes.dapo import batch_of_the_paper, mathematics, mean_of_32, plus_minus_one


def qwen3_30b_a3b_dapo_32xh100() -> RunConfig:
    """τ = 0.1: 4 nodes of 8 H100, 512 prompts x 16 responses, 16 optimizer steps a rollout, 2k + 8k tokens.

    300 optimizer steps in the paper are 19 rollouts of 16.
    """
    return _paper("qwen3_30b_a3b_dapo_32xh100", tau=0.1)


def qwen3_30b_a3b_dapo_tau005_32xh100() -> RunConfig:
    """τ = 0.05, otherwise the same: the mean follows half the regularisation."""
    return _paper("qwen3_30b_a3b_dapo_tau005_32xh100", tau=0.05)


def qwen3_30b_a3b_fp8_32xh100() -> RunConfig:
    """The same with FP8 matrix multiplications, in blocks of 128 x 128, in the actor and in its engines.

    FP8 on one side alone widens the gap between their log-probabilities most (docs/recipes.md); even so the
    bounds on it are wider than those of bf16.
    """
    run = _paper("qwen3_30b_a3b_fp8_32xh100", tau=0.1)
    return run.model_copy(update=_fp8(run))


def _fp8(run: RunConfig) -> dict[str, Any]:
    return {
        "actor": run.actor.model_copy(update={"fp8": Fp8(recipe="blockwise")}),
        # 4 devices would cut an expert's 768 columns into parts that are not whole blocks
        "rollout": run.rollout.model_copy(update={"tensor_parallel": 2, "fp8": True}),
    }


def _paper(name: str, *, tau: float) -> RunConfig:
    return RunConfig(
        name=name,
        iterations=19,
        model=Model(path="models/Qwen3-30B-A3B-Base", precision="bf16"),
        layout=Layout(tensor=4, expert=8, data=8),
        batch=batch_of_the_paper(max_tokens_per_microbatch=20480),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=tau),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(recompute="full", timeout_seconds=1800),
        rollout=Rollout(
            tensor_parallel=4,
            max_running_requests=512,
            request_timeout_seconds=7200,
            sglang={"mem_fraction_static": 0.7},
        ),
        sync=Sync(bucket_megabytes=1024),
        data=mathematics(),
        reward=plus_minus_one(),
        evaluation=mean_of_32(),
        checkpoint=Checkpoint(every=5),
    )
