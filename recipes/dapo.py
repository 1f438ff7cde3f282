"""What the mathematics recipes share: DAPO-Math-17k to train on, AIME 2024 and 2025 held out, rewards of ±1.

`tools/prepare_dapo.py` writes both files from local copies of the published ones.
"""

from __future__ import annotations

from megatron_pmd.config import Batch, Data, Evaluation, FileSource, Reward
from megatron_pmd.data.problems import Problem


def mathematics() -> Data:
    """Prompts as DAPO published them: the question with its instruction is one user message."""
    return Data(
        train=FileSource(path="data/dapo-math-17k.jsonl"),
        evaluation=FileSource(path="data/aime-2024-2025.jsonl"),
    )


def batch_of_the_paper(*, max_tokens_per_microbatch: int) -> Batch:
    """512 prompts x 16 responses in 16 optimizer steps, 2k + 8k tokens a sample (arXiv 2602.05933)."""
    return Batch(
        prompts_per_rollout=512,
        samples_per_prompt=16,
        prompts_per_step=32,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_prompt_tokens=2048,
        max_response_tokens=8192,
    )


def plus_minus_one() -> Reward:
    """Rewards of the paper's values (arXiv 2602.05933): 1 for a right answer, -1 for a wrong one."""
    return Reward(
        name="recipes.dapo:signed_score", answer="whole", workers=16, timeout_seconds=10.0, failed=-1.0
    )


def mean_of_32() -> Evaluation:
    """60 problems, 32 answers each, every 10 iterations, sampled as in training."""
    return Evaluation(every=10, prompts=60, samples_per_prompt=32)


def signed_score(response: str, problem: Problem, truncated: bool = False) -> float:
    """1 if the answer that the response states equals the problem's, else -1.

    DAPO's published rule compares texts, and only what stands behind `Answer:` in the last 300 characters.
    This one pays what it pays, and equal values in other spellings and other statements: docs/benchmarks.md,
    "Grading".
    """
    from megatron_pmd.rewards.mathematics import score

    return 2 * score(response, problem, truncated=truncated) - 1
