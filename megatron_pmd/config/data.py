"""Settings of the problems, of what a response to one is worth, and of evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen, Seed
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry

REWARDS = Registry(
    "reward",
    {
        "exact": "megatron_pmd.rewards.exact:score",
        "math": "megatron_pmd.rewards.mathematics:score",
        "reasoning_gym": "megatron_pmd.rewards.procedural:score",
    },
)
"""Functions (response, problem) -> float by name. To add a reward, write its file and its line here."""

RENDERED = {"messages", "conversation", "chat_template", "add_generation_prompt", "tokenize", "return_dict"}
"""What a prompt is rendered with, which no template argument may replace."""


class FileSource(Frozen):
    kind: Literal["file"] = "file"
    path: str | tuple[str, ...] = Field(min_length=1)
    """JSON lines (.jsonl, also .jsonl.gz and .jsonl.zst) or Parquet (.parquet): one problem a row. Several
    files are a JSON list. `FILE@[0:100]` is the first 100 rows of a file."""
    prompt_key: str = "prompt"
    """Column of the prompt: a string, or a list of chat messages with role and content. A key with dots leads
    into objects and lists: `a.b` is b of a, `a.0` the first of a."""
    answer_key: str = "answer"
    """Column of the answer, a string or a number: `reward_model.ground_truth` in verl's files, `label` in
    slime's.
    `messages.-1.content` with prompt_key `messages`: the last message is the answer, and no part of the
    prompt."""
    difficulty_key: str | None = None
    """A number, the larger the harder; data.sampling=curriculum orders by it."""
    token_budget_key: str | None = None
    """Longest response to this problem, in tokens; batch.max_response_tokens where it is null."""


class ReasoningGymSource(Frozen):
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """A reasoning-gym dataset, by name."""
    size: PositiveInt
    seed: Seed = 0
    parameters: dict[str, Any] = {}
    """The task's own settings, e.g. min_digits."""


Sampling = Literal["uniform", "in_order", "curriculum", "prioritised"]
Source = Annotated[FileSource | ReasoningGymSource, Field(discriminator="kind")]


class Data(Frozen):
    train: Source
    evaluation: Source | None = None
    """Held-out problems."""
    system_prompt: str | None = None
    """None: what the model's chat template adds by itself."""
    prompt_suffix: str = ""
    """Appended to every problem's text, e.g. how to format the answer."""
    template_arguments: dict[str, Any] = {}
    """Given to the chat template as variables, e.g. `{"enable_thinking": false}` for Qwen3."""
    sampling: Sampling = "uniform"
    """`uniform`: every epoch in a new random order. `in_order`: as in the file. `curriculum`: the first
    epoch from
    easy to hard, then uniform. `prioritised`: drawn with probability ∝ 1 − success rate so far."""

    @model_validator(mode="after")
    def _difficulty(self) -> Self:
        has_one = isinstance(self.train, FileSource) and self.train.difficulty_key is not None
        if self.sampling == "curriculum" and not has_one:
            raise ConfigError(
                "data.sampling=curriculum needs data.train.difficulty_key, a column of the file"
            )
        return self

    @model_validator(mode="after")
    def _of_the_template(self) -> Self:
        for name in self.template_arguments.keys() & RENDERED:
            raise ConfigError(
                f"data.template_arguments.{name}: it is given to the chat template by this program; remove it"
            )
        return self


class LengthReward(Frozen):
    weight: PositiveFloat
    """Of Kimi K1.5's group length reward: up to half of this is added for a short correct response, taken
    for a
    long one."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations before it starts."""


class RemoteReward(Frozen):
    """A service that grades over HTTP (docs/rollout.md)."""

    url: str = Field(pattern=r"^https?://")
    """Gets a POST for each sample."""
    retries: NonNegativeInt = 6
    """Times a request is sent again when the service fails, waiting 0.5 s, 1 s, 2 s, …"""
    max_in_flight: PositiveInt = 64
    """Requests at one time."""


class Reward(Frozen):
    name: str
    """`math`, `reasoning_gym`, `exact`, `remote`, or your own (response, problem) -> float, as
    `module:function` or `path/to/file.py:function`."""
    remote: RemoteReward | None = None
    """The service, for `remote`."""
    answer: Literal["whole", "last_integer", "last_line"] = "whole"
    """Which part of the response is graded."""
    timeout_seconds: PositiveFloat = 10.0
    """For one sample; a reward that takes longer counts as 0."""
    memory_gigabytes: PositiveFloat = 0.5
    """For one worker, beside what it has taken when the reward is loaded; a sample that needs more counts as
    0. `remote` has none."""
    workers: PositiveInt = 2
    """Processes; `remote` has none."""
    correct: float = 1.0
    """A response with at least this reward is correct: for pass@k, the length reward and prioritised
    prompts."""
    length: LengthReward | None = None
    truncation_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of a response that was cut at its token budget."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name != "remote":
            REWARDS.reference(self.name, what="reward.name")
        return self

    @model_validator(mode="after")
    def _remote_has_a_service(self) -> Self:
        if (self.name == "remote") != (self.remote is not None):
            raise ConfigError(
                "reward.name=remote needs reward.remote.url"
                if self.remote is None
                else f"reward.remote is set but reward.name is {self.name!r}, which does not use it; "
                "set reward.name=remote"
            )
        return self


class Evaluation(Frozen):
    every: PositiveInt | None = None
    """Iterations between evaluations; None: before the first and after the last, with data.evaluation."""
    prompts: PositiveInt = 64
    """The first so many held-out problems."""
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
