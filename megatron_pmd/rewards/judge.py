"""Reward `judge`: a chat model reads the response and writes a score, over any OpenAI-compatible server."""

from __future__ import annotations

import re
from typing import Any

from megatron_pmd.config import Reward
from megatron_pmd.config.services import PLACEHOLDER
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.graders import extract
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.service import TOO_LONG, ServiceReward
from megatron_pmd.rewards.stated_answer import after_thinking


class JudgeReward(ServiceReward):
    """A client of the chat model in reward.judge.

    POST url/chat/completions, at temperature 0, with the template as the user's only message. The last match
    of the pattern in the answer is the score; the reward is its share of the highest score.
    """

    what = "judge"
    repeatable = True
    about_a_sample = TOO_LONG

    def __init__(self, reward: Reward) -> None:
        assert reward.judge is not None, "config.Reward sees to that"
        self._settings = reward.judge
        self._pattern = re.compile(self._settings.score_pattern)
        url = f"{self._settings.url.rstrip('/')}/chat/completions"
        super().__init__(reward, self._settings, url)

    def body(self, response: str, problem: Problem, truncated: bool) -> dict[str, Any]:
        """The response without its thoughts: a judge is to see what a user would."""
        questions = [message["content"] for message in problem.messages if message["role"] == "user"]
        values = {
            "question": questions[-1] if questions else "",
            "response": extract(after_thinking(response).strip(), self.reward.answer),
            "answer": problem.answer,
        }
        # in one pass: a response that has {answer} in it is left as it is
        asked = PLACEHOLDER.sub(lambda found: values[found[1]], self._settings.template)
        return {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": self._settings.max_tokens,
        }

    def verdict(self, answer: Any) -> Verdict:
        choice = answer["choices"][0]
        said = after_thinking(choice["message"]["content"] or "")
        scores = [found[1] for found in self._pattern.finditer(said)]
        if not scores:
            cut = choice.get("finish_reason") == "length"
            why = f", cut at reward.judge.max_tokens={self._settings.max_tokens}" if cut else ""
            return Verdict(0.0, f"the judge gave no score{why}: {said[-200:]!r}")
        score, highest = float(scores[-1]), self._settings.highest_score
        if not 0 <= score <= highest:
            return Verdict(
                0.0, f"the judge gave {score:g}, which is not from 0 to {highest:g}: {said[-200:]!r}"
            )
        return Verdict(score / highest)
