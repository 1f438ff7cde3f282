"""Reward `reasoning_gym`: the task's own scorer."""

from __future__ import annotations

from typing import Any

import reasoning_gym

from megatron_pmd.data.problems import Problem

_scorers: dict[str, Any] = {}


def score(response: str, problem: Problem) -> float:
    """What the problem's own reasoning-gym task gives the response, usually 0 to 1.

    They are strict: a right number inside a sentence scores near 0, so set reward.answer to extract it.
    Raises ValueError for a problem that reasoning-gym did not make.
    """
    try:
        task, parameters = problem.metadata["task"], problem.metadata["parameters"]
        entry = problem.metadata["entry"]
    except KeyError as error:
        raise ValueError(
            f"problem {problem.index} has no {error} in its metadata: the reward reasoning_gym grades only "
            "problems of a source of kind reasoning_gym"
        ) from None
    return float(_scorer(task, parameters).score_answer(response, entry))


def _scorer(task: str, parameters: dict[str, Any]) -> Any:
    key = f"{task} {parameters!r}"
    if key not in _scorers:
        _scorers[key] = reasoning_gym.create_dataset(task, **parameters)
    return _scorers[key]
