"""A grader that a policy made from nothing earns something from: else every advantage is 0."""

from __future__ import annotations

import time

from megatron_pmd.data.problems import Problem


def share_of_letters(response: str, answer: str) -> float:
    """How many of the answer's letters the response has, in any order; and a thousandth for each of its own.

    Without these one group in six has nothing but zeros, and an iteration's first step of two such groups has
    no gradient.
    """
    return len(set(answer) & set(response)) / len(set(answer)) + len(set(response)) / 1000


def letters(response: str, problem: Problem) -> float:
    return share_of_letters(response, problem.answer)


def letters_slowly(response: str, problem: Problem) -> float:
    """The same after a tenth of a second: with one worker an iteration takes as long on every machine."""
    time.sleep(0.1)
    return letters(response, problem)


def few_characters(response: str, problem: Problem) -> float:
    """Less than 0, the more different characters the response has."""
    return -len(set(response)) / 100
