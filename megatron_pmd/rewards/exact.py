"""Reward `exact`: the response is the answer, up to blanks around it."""

from __future__ import annotations

from megatron_pmd.data.problems import Problem


def score(response: str, problem: Problem) -> float:
    """1 if the stripped texts are equal, else 0."""
    return float(response.strip() == problem.answer.strip())
