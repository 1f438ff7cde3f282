"""A grader that a policy made from nothing earns something from: else every advantage is 0."""

from __future__ import annotations

from megatron_pmd.data.problems import Problem


def share_of_letters(response: str, answer: str) -> float:
    """How many of the answer's letters the response has, in any order."""
    return len(set(answer) & set(response)) / len(set(answer))


def letters(response: str, problem: Problem) -> float:
    return share_of_letters(response, problem.answer)
