"""Reward `remote`: a service of the user's grades over HTTP."""

from __future__ import annotations

import math
from typing import Any

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.graders import extract
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.service import ServiceReward


class RemoteReward(ServiceReward):
    """A client of the service in reward.remote.

    POST url, JSON {"response", "truncated", "answer", "messages", "metadata", "index"} -> JSON
    {"reward": number}.
    """

    what = "reward service"

    def __init__(self, reward: Reward) -> None:
        assert reward.remote is not None, "config.Reward sees to that"
        super().__init__(reward, reward.remote, reward.remote.url)

    def body(self, response: str, problem: Problem, truncated: bool) -> dict[str, Any]:
        return {
            "response": extract(response, self.reward.answer),
            "truncated": truncated,
            "answer": problem.answer,
            "messages": list(problem.messages),
            "metadata": _finite(problem.metadata),
            "index": problem.index,
        }

    def verdict(self, answer: Any) -> Verdict:
        value = answer["reward"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return Verdict(0.0, f"the reward service gave {value!r:.80}, not a finite number")
        return Verdict(float(value))


def _finite(value: Any) -> Any:
    """With null for a number that is not finite: it has no word in JSON, and strict services refuse NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value
