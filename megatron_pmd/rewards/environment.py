"""Reward `environment`: what the program that made the response has found it to be worth."""

from __future__ import annotations

from megatron_pmd.data.problems import Problem


def score(response: str, problem: Problem) -> float:
    """The number that the program of rollout.agent returned as its text. Raises ValueError for other text."""
    try:
        return float(response)
    except ValueError:
        raise ValueError(
            f"the text to be graded is {response[:60]!r}; reward.name=environment takes the number that a "
            "program of rollout.agent returns"
        ) from None
