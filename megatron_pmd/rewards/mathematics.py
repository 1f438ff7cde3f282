"""Reward `math`: mathematical equality with the answer, by math-verify."""

from __future__ import annotations

import functools
import logging
from typing import Any

import math_verify

from megatron_pmd.data.problems import Problem

# It warns once a process that its own time limit is off; ours (reward.timeout_seconds) replaces it.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(response: str, problem: Problem) -> float:
    """1 if the last expression of the response equals the answer, else 0.

    An answer may be bare LaTeX (\\frac12), or text with its mathematics in $…$ or \\boxed{…}. ValueError if
    there is no mathematics in it.
    """
    gold = _gold(problem.answer)
    if not gold:
        raise ValueError(
            f"problem {problem.index}: math-verify finds no mathematics in the answer {problem.answer!r}"
        )
    # its limits use SIGALRM, which only a main thread may set: off here and in parse
    return float(
        math_verify.verify(gold, math_verify.parse(response, parsing_timeout=None), timeout_seconds=None)
    )


@functools.lru_cache(maxsize=4096)
def _gold(answer: str) -> list[Any]:
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    # math-verify reads LaTeX only between marks: of a bare \frac{1}{2} it would take the 2
    text = answer if marked else f"${answer}$"
    return math_verify.parse(text, parsing_timeout=None) or math_verify.parse(answer, parsing_timeout=None)
