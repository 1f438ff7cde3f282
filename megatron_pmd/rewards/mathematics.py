"""Reward `math`: mathematical equality of the stated answer with the reference, by math-verify."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any

import math_verify
from math_verify import LatexExtractionConfig

from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.plain_mathematics import latex
from megatron_pmd.rewards.stated_answer import LONGEST_STATEMENT, stated_answer, words

# It warns once a process that its own time limit is off; ours (reward.timeout_seconds) replaces it.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_TEXT = re.compile(r"\\text\w*\s*\{[^{}]*[A-Za-z]{2}[^{}]*\}|[A-Za-z]{3,}(?:\s+\w+)*")
_SCALED_NAME = re.compile(r"\s*-?\d+\s*[A-Za-z]\w*\s*=")
_PERCENT = r"\%"


@dataclass(frozen=True)
class _Reference:
    """A problem's answer as math-verify reads it."""

    expressions: list[Any]
    text: bool
    """It is words."""
    percent: bool
    equation: bool


def score(response: str, problem: Problem, truncated: bool = False) -> float:
    """1 if the answer that the response states equals the reference answer, else 0.

    `stated_answer` says what a statement is. Several values are compared as a set, 50% equals 50 and 0.5. The
    reference may be bare LaTeX (\\frac12), or text with its mathematics in $…$ or \\boxed{…}. ValueError if
    there is no mathematics in it.
    """
    reference = _reference(problem.answer)
    if not reference.expressions:
        raise ValueError(
            f"problem {problem.index}: math-verify finds no mathematics in the answer {problem.answer!r}"
        )
    stated = stated_answer(response, truncated=truncated, text=reference.text)
    return 0.0 if stated is None else _equal(problem.answer, stated)


@functools.lru_cache(maxsize=4096)  # the samples of a problem mostly state the same few answers
def _equal(answer: str, stated: str) -> float:
    reference = _reference(answer)
    if len(stated) > LONGEST_STATEMENT:
        return 0.0
    if reference.percent and _PERCENT in stated:
        return _equal(re.sub(r"\\?%", "", answer), stated.replace(_PERCENT, ""))
    if _SCALED_NAME.match(stated) and not reference.equation:
        return 0.0  # math-verify would take 2x = 4 for the value 4
    expressions = _parse(stated) if reference.text else _readings(stated)
    # its limits use SIGALRM, which only a main thread may set: off here and in parse
    return float(
        math_verify.verify(
            reference.expressions, expressions, allow_set_relation_comp=True, timeout_seconds=None
        )
    )


@functools.lru_cache(maxsize=4096)
def _reference(answer: str) -> _Reference:
    answer = answer.strip()
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    text = bool(_TEXT.fullmatch(answer))
    if text:
        expressions = _parse(words(answer) or "")
    elif marked and "\\$" not in answer:
        expressions = math_verify.parse(answer, parsing_timeout=None)
    else:
        expressions = _readings(latex(answer)) or math_verify.parse(answer, parsing_timeout=None)
    return _Reference(expressions, text, "%" in answer, "=" in answer)


def _readings(value: str) -> list[Any]:
    """A percentage also as a fraction."""
    number = value.replace(_PERCENT, "")
    return _parse(number) + (_parse(rf"\frac{{{number}}}{{100}}") if number != value else [])


def _parse(value: str) -> list[Any]:
    # math-verify reads LaTeX only between marks: of a bare \frac{1}{2} it would take the 2
    return math_verify.parse(f"${value}$", [LatexExtractionConfig()], parsing_timeout=None) if value else []
