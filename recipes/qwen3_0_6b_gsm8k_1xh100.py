"""A small dense model on one GPU: the first recipe to run on a machine that has one (docs/first-run.md)."""

from __future__ import annotations

from dataclasses import replace

from megatron_pmd.config import (
    Algorithm,
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    FileSource,
    Layout,
    Model,
    Optimizer,
    Reward,
    Rollout,
    RunConfig,
    Sync,
)
from megatron_pmd.data.problems import Problem
from megatron_pmd.objectives.pmd import Pmd


def qwen3_0_6b_gsm8k_1xh100() -> RunConfig:
    """Qwen3-0.6B-Base on GSM8K: one rank, one engine beside it.

    Its authors report 59.6 % of GSM8K's test problems, with four examples in the prompt (arXiv 2505.09388).
    """
    return RunConfig(
        name="qwen3_0_6b_gsm8k_1xh100",
        iterations=20,
        model=Model(path="models/Qwen3-0.6B-Base", precision="bf16"),
        layout=Layout(),
        batch=Batch(
            prompts_per_rollout=64,
            samples_per_prompt=8,
            prompts_per_step=8,
            max_tokens_per_microbatch=16384,
            max_prompt_tokens=512,
            max_response_tokens=1024,
        ),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=1e-6),
        rollout=Rollout(max_running_requests=512, sglang={"mem_fraction_static": 0.6}),
        sync=Sync(bucket_megabytes=512),
        data=Data(
            train=_published("train"),
            evaluation=_published("test"),
            prompt_suffix="\nLet's think step by step and put the final answer in \\boxed{}.",
        ),
        reward=Reward(name="recipes.qwen3_0_6b_gsm8k_1xh100:score", workers=4),
        evaluation=Evaluation(every=10, prompts=256),
        checkpoint=Checkpoint(every=5),
    )


def score(response: str, problem: Problem, truncated: bool = False) -> float:
    """1 if the answer that the response states equals what the published solution has behind ####, else 0."""
    from megatron_pmd.rewards import mathematics

    answer = problem.answer.rpartition("####")[2].strip().replace(",", "")
    return mathematics.score(response, replace(problem, answer=answer), truncated=truncated)


def _published(split: str) -> FileSource:
    """The file of openai/gsm8k as it is published, main/SPLIT-00000-of-00001.parquet."""
    return FileSource(path=f"data/gsm8k/{split}-00000-of-00001.parquet", prompt_key="question")
