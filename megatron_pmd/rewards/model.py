"""Reward `model`: the score of a sequence-classification model that an SGLang server holds."""

from __future__ import annotations

import math
import threading
from typing import Any, Self

import httpx

from megatron_pmd.config import Model, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import need_chat_template
from megatron_pmd.data.tokenizer import load_tokenizer
from megatron_pmd.errors import ConfigError, DataError, PmdError
from megatron_pmd.rewards.graders import extract
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.service import TOO_LONG, ServiceReward
from megatron_pmd.rewards.stated_answer import after_thinking


class ModelReward(ServiceReward):
    """A client of the reward model in reward.model.

    POST url/classify, JSON {"input_ids": [...]}: the conversation with the response as its last message, in
    the reward model's own chat template. The answer has the model's output for the last token, which is the
    reward as it is. SGLang's /v1/classify answers with a softmax, which is 1 for a model of one output.
    """

    what = "reward model"
    repeatable = True
    about_a_sample = TOO_LONG

    def __init__(self, reward: Reward) -> None:
        """ModelError or DataError for a folder without a tokenizer or a chat template."""
        assert reward.model is not None, "config.Reward sees to that"
        self._tokenizer = load_tokenizer(Model(path=reward.model.tokenizer))
        need_chat_template(self._tokenizer)
        self._one_at_a_time = threading.Lock()
        self._server = reward.model.url.rstrip("/")
        super().__init__(reward, reward.model, f"{self._server}/classify")

    def __enter__(self) -> Self:
        """PmdError where nothing answers, ConfigError where the server has a model that generates text.

        Such a server refuses every sample with the status of one that is too long.
        """
        try:
            reply = self.client.get(f"{self._server}/model_info")
            generates = reply.json()["is_generation"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            self.__exit__(None, None, None)
            raise PmdError(
                f"reward.model.url: {self._server}/model_info does not answer as SGLang's does: "
                f"{type(error).__name__}: {error}; is the server running?"
            ) from None
        if generates:
            self.__exit__(None, None, None)
            raise ConfigError(
                f"reward.model.url: {self._server} serves a model that generates text; serve a "
                "sequence-classification model, and give SGLang --is-embedding if it does not know its kind"
            )
        return self

    def body(self, response: str, problem: Problem, truncated: bool) -> dict[str, Any]:
        """The response without its thoughts: reward models are trained on what a user sees."""
        answer = extract(after_thinking(response).strip(), self.reward.answer)
        messages = [*problem.messages, {"role": "assistant", "content": answer}]
        try:
            with self._one_at_a_time:  # a tokenizer that two threads use at a time raises
                tokens = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        except Exception as error:  # jinja's, or whatever the template's own raise_exception leads to
            raise DataError(
                f"problem {problem.index}: the reward model's chat template refuses its messages: {error}"
            ) from error
        return {"input_ids": tokens}

    def verdict(self, answer: Any) -> Verdict:
        """PmdError for a model of several outputs: none of them is known to be the reward."""
        outputs = answer["embedding"]
        if len(outputs) != 1:
            raise PmdError(
                f"the reward model at {self._server} has {len(outputs)} outputs; one with a single output "
                "(num_labels=1) is expected"
            )
        value = float(outputs[0])
        if not math.isfinite(value):
            return Verdict(0.0, f"the reward model gave {value}")
        return Verdict(value)
