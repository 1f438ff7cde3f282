"""From a reward's name to the function that grades, and which part of a response it is given."""

from __future__ import annotations

import inspect
import re
from typing import Protocol

from megatron_pmd.config import REWARDS, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError


class Grader(Protocol):
    """From a response to its reward; `truncated`: it was cut, at its budget or in a repetition."""

    def __call__(self, response: str, problem: Problem, truncated: bool = False) -> float: ...


_INTEGER = re.compile(
    # 5-3, x-3 and (2)-3 subtract: only a minus after anything else is a sign
    r"((?<![0-9A-Za-z_)\]}])[-\u2212])?"
    # digits inside a word (x2) or after a decimal point (.5) are no integer
    r"(?<![0-9A-Za-z_.])"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
    r"(\.[0-9]+)?"
)


def grader(reward: Reward) -> Grader:
    """The function that `reward` names, on the part of the response that reward.answer says.

    A reward is called with (response, problem); one with a parameter `truncated` is also told whether the
    response was cut. Imports the reward's module and its libraries. Raises ConfigError if
    that fails or if the name is unknown.
    """
    score = REWARDS.load(reward.name, what="reward.name")
    is_told = "truncated" in inspect.signature(score).parameters

    def grade(response: str, problem: Problem, truncated: bool = False) -> float:
        part = extract(response, reward.answer)
        return score(part, problem, truncated=truncated) if is_told else score(part, problem)

    return grade


def extract(response: str, how: str) -> str:
    """The part of a response that is graded: `whole`, `last_integer` or `last_line`; '' if there is none.

    last_integer: without thousands separators and leading zeros (`-1,024` gives `-1024`); a decimal (3.14) or
    a number that ends a word (x2) is none. last_line: the last one that is not blank, stripped.
    """
    if how == "whole":
        return response
    if how == "last_line":
        return next((line.strip() for line in reversed(response.splitlines()) if line.strip()), "")
    if how == "last_integer":
        found = [m for m in _INTEGER.finditer(response) if not m[3]]
        if not found:
            return ""
        digits = found[-1][2].replace(",", "").lstrip("0") or "0"
        return "-" + digits if found[-1][1] and digits != "0" else digits
    raise ConfigError(f"reward.answer={how!r} is unknown; use whole, last_integer or last_line")
