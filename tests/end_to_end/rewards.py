"""A grader that a policy made from nothing earns something from: else every advantage is 0."""

from __future__ import annotations

from megatron_pmd.data.problems import Problem


def letters(response: str, problem: Problem) -> float:
    """Share of the answer's letters that the response has."""
    wanted = set(problem.answer)
    return len(wanted & set(response)) / len(wanted)
