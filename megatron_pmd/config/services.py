"""Settings of the services that are asked over HTTP about what was sampled."""

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


class Service(Frozen):
    """A service that gets one request for each sample."""

    url: str = Field(pattern=r"^https?://")
    """Gets a POST for each sample."""
    retries: NonNegativeInt = 6
    """Times a request is sent again when the service fails, waiting 0.5 s, 1 s, 2 s, …"""
    max_in_flight: PositiveInt = 64
    """Requests at one time."""
    key_file: str | None = None
    """A file with the service's key, which is sent as a bearer's token; the run's files have its path."""


class RemoteReward(Service):
    """A service that grades over HTTP (docs/rollout.md)."""


class Judge(Service):
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


class RewardModel(Service):
    """A sequence-classification model that SGLang serves (docs/judges.md)."""

    url: str = Field(pattern=r"^https?://")
    """Of the SGLang server, as `http://HOST:PORT`: it gets a POST to url/classify for each sample."""
    tokenizer: str
    """The reward model's folder, for its tokenizer and chat template: the server is sent token ids."""


class Teacher(Service):
    """A model that SGLang serves, whose log-probabilities of the sampled tokens are learned from
    (docs/teachers.md)."""

    url: str = Field(pattern=r"^https?://")
    """Of the SGLang server, as `http://HOST:PORT`: it gets a POST to url/generate for each response. It must
    have the model's own vocabulary."""
    retries: NonNegativeInt = 6
    """Times a request is sent again when the server fails, waiting 1 s, 2 s, 4 s, …"""
    weight: PositiveFloat = 1.0
    """β: with a reward, r + τ β log π_T/π_t of a response takes the place of its reward r."""
    timeout_seconds: PositiveFloat = 600.0
    """For one request; one that takes longer is sent again."""
