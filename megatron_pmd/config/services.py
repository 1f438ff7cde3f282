"""Settings of the services that grade over HTTP."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import did_you_mean

PLACEHOLDER = re.compile(r"\{(\w+)\}")
PLACEHOLDERS = ("question", "response", "answer")
TEMPLATE = """\
You grade an answer to a question.

Question:
{question}

Reference answer:
{answer}

Answer to grade:
{response}

How right, complete and clear is it? Explain in two sentences. Then write on a line of its own:
Score: a number from 0 to 10
"""


class RemoteReward(Frozen):
    """A service that grades over HTTP (docs/rollout.md)."""

    url: str = Field(pattern=r"^https?://")
    """Gets a POST for each sample."""
    retries: NonNegativeInt = 6
    """Times a request is sent again when the service fails, waiting 0.5 s, 1 s, 2 s, …"""
    max_in_flight: PositiveInt = 64
    """Requests at one time."""
    key_file: str | None = None
    """A file with the service's key, which is sent as a bearer's token; the run's files have its path."""


class Judge(RemoteReward):
    """A chat model that grades (docs/judges.md)."""

    url: str = Field(pattern=r"^https?://")
    """Of an OpenAI-compatible API, as `http://HOST:PORT/v1`: it gets a POST to url/chat/completions for each
    sample."""
    model: str
    """Its name there."""
    template: str = TEMPLATE
    """The question to the judge. `{question}` stands for the last message of the prompt, `{response}` for
    what is graded, `{answer}` for the problem's answer."""
    score_pattern: str = r"[Ss]core\**:?\**\s*(-?\d+(?:\.\d+)?)"
    """A regular expression whose group is the score; its last match in what the judge writes counts."""
    highest_score: PositiveFloat = 10.0
    """The reward is score / highest_score. A score that is not from 0 to this is none."""
    max_tokens: PositiveInt = 1024
    """Longest answer of the judge, in tokens, its thoughts included."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        named = PLACEHOLDER.findall(self.template)
        for name in named:
            if name not in PLACEHOLDERS:
                raise ConfigError(
                    f"reward.judge.template has {{{name}}}{did_you_mean(name, PLACEHOLDERS)}; use "
                    "{question}, {response} and {answer}"
                )
        if "response" not in named:
            raise ConfigError(
                "reward.judge.template has no {response}: the judge would not see what it grades"
            )
        try:
            groups = re.compile(self.score_pattern).groups
        except re.error as error:
            raise ConfigError(
                f"reward.judge.score_pattern={self.score_pattern!r} is no regular expression: {error}"
            ) from None
        if groups != 1:
            raise ConfigError(
                f"reward.judge.score_pattern={self.score_pattern!r} has {groups} groups; one, around the "
                "number, is expected"
            )
        return self


class RewardModel(RemoteReward):
    """A sequence-classification model that SGLang serves (docs/judges.md)."""

    url: str = Field(pattern=r"^https?://")
    """Of the SGLang server, as `http://HOST:PORT`: it gets a POST to url/classify for each sample."""
    tokenizer: str
    """The reward model's folder, for its tokenizer and chat template: the server is sent token ids."""
