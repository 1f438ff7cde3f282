"""Settings of the problems, of what a response to one is worth, and of evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from megatron_pmd.config.frozen import Frozen, Seed
from megatron_pmd.config.services import Judge, RemoteReward, RewardModel
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry

REWARDS = Registry(
    "reward",
    {
        "code": "megatron_pmd.rewards.code:CodeReward",
        "environment": "megatron_pmd.rewards.environment:score",
        "exact": "megatron_pmd.rewards.exact:score",
        "judge": "megatron_pmd.rewards.judge:JudgeReward",
        "math": "megatron_pmd.rewards.mathematics:score",
        "model": "megatron_pmd.rewards.model:ModelReward",
        "reasoning_gym": "megatron_pmd.rewards.procedural:score",
        "remote": "megatron_pmd.rewards.remote:RemoteReward",
    },
)
"""Functions (response, problem) -> float by name, and classes that grade in sandboxes or over HTTP. To add a
reward, write its file and its line here."""

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


class VerifiersSource(Frozen):
    kind: Literal["verifiers"] = "verifiers"
    taskset: str
    """An installed environment of the library `verifiers`, by its name there (docs/environments.md)."""
    size: PositiveInt | None = None
    """Only the first so many tasks."""
    parameters: dict[str, Any] = {}
    """The taskset's own settings."""
    settings: dict[str, Any] = {}
    """What else verifiers' own `[env]` block has: its agents, their programs and limits."""
    python: str = ".venv-verifiers/bin/python"
    """An interpreter that has `verifiers` and the environment; `make verifiers` installs it."""


Stage = Literal["train", "evaluation"]
Sampling = Literal["uniform", "in_order", "curriculum", "prioritised"]
Source = Annotated[FileSource | ReasoningGymSource | VerifiersSource, Field(discriminator="kind")]


class LengthReward(Frozen):
    weight: PositiveFloat
    """Of Kimi K1.5's group length reward: up to half of this is added for a short correct response, taken
    for a
    long one."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations before it starts."""


class Reward(Frozen):
    name: str
    """`math`, `reasoning_gym`, `exact`, `code` (docs/code.md), `judge` and `model` (docs/judges.md),
    `environment` (docs/environments.md), `remote`, or your own (response, problem) -> float, as
    `module:function` or `path/to/file.py:function`."""
    remote: RemoteReward | None = None
    """The service, for `remote`."""
    judge: Judge | None = None
    """The chat model, for `judge`."""
    model: RewardModel | None = None
    """The reward model, for `model`."""
    tests_key: str | None = None
    """Column of a problem's tests, for `code`; None: its answer has them."""
    answer: Literal["whole", "last_integer", "last_line"] = "whole"
    """Which part of the response is graded."""
    timeout_seconds: PositiveFloat = 10.0
    """For one sample, all its tests together; one that takes longer has failed. For one request to a service:
    one that takes longer is sent again."""
    memory_gigabytes: PositiveFloat = 0.5
    """For one worker, beside what it has taken when the reward is loaded, or for one program of `code`; a
    sample that needs more has failed. A service has none."""
    workers: PositiveInt = 2
    """Processes, or sandboxes of `code`; a service has none."""
    correct: float = 1.0
    """A response with at least this reward is correct: for pass@k, the length reward and prioritised
    prompts."""
    length: LengthReward | None = None
    failed: float = 0.0
    """What a response is worth that could not be graded: the reward or its worker failed, or an agent's
    program. Not more than a wrong answer, or the policy learns to make the grader fail."""
    truncation_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of a response that was cut, at its token budget or in a repetition."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        REWARDS.reference(self.name, what="reward.name")
        return self

    @model_validator(mode="after")
    def _only_code_has_tests(self) -> Self:
        if self.tests_key is not None and self.name != "code":
            raise ConfigError(
                f"reward.tests_key is set but reward.name is {self.name!r}, which runs no tests; "
                "set reward.name=code"
            )
        return self

    @model_validator(mode="after")
    def _each_service_has_its_reward(self) -> Self:
        services = {"remote": self.remote, "judge": self.judge, "model": self.model}
        for name, service in services.items():
            if (self.name == name) != (service is not None):
                raise ConfigError(
                    f"reward.name={name} needs reward.{name}.url"
                    if service is None
                    else f"reward.{name} is set but reward.name is {self.name!r}, which does not use it; "
                    f"set reward.name={name}"
                )
        return self


class HeldOutSource(Frozen):
    """One of several sources of problems. What it does not set is the run's own setting."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Under which metrics, evaluations and the report speak of it."""
    source: Source
    """Its problems: the settings of a single data.train."""
    reward: Reward | None = None
    """In the place of `reward`, as a whole; the same settings."""
    system_prompt: str | None = None
    """In the place of data.system_prompt."""
    prompt_suffix: str | None = None
    """In the place of data.prompt_suffix."""
    template_arguments: dict[str, Any] | None = None
    """In the place of data.template_arguments, as a whole."""
    max_prompt_tokens: PositiveInt | None = None
    """At most batch.max_prompt_tokens."""
    max_response_tokens: PositiveInt | None = None
    """At most batch.max_response_tokens; a problem's own token budget may be smaller."""

    @field_validator("reward", mode="wrap")
    @classmethod
    def _where_it_is(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return validate(value)
        except ConfigError as error:
            raise ConfigError(f"data source {info.data.get('name')!r}: {error}") from None

    @model_validator(mode="after")
    def _of_the_template(self) -> Self:
        _refuse_rendered(self.template_arguments or {}, f"data source {self.name!r}: template_arguments")
        return self


class TrainingSource(HeldOutSource):
    weight: PositiveFloat = 1.0
    """Share of the prompts drawn, relative to the other sources' weights."""
    tau: PositiveFloat | None = None
    """In the place of algorithm.tau; algorithm.tau_schedule does not change it."""


def _form(value: Any) -> str:
    return MIXTURE if isinstance(value, list | tuple) else SINGLE


SINGLE, MIXTURE = "a source", "a list of sources"
"""What data.train and data.evaluation can be."""
_Form = Discriminator(_form)
Training = Annotated[
    Annotated[Source, Tag(SINGLE)] | Annotated[tuple[TrainingSource, ...], Tag(MIXTURE)], _Form
]
HeldOut = Annotated[
    Annotated[Source, Tag(SINGLE)] | Annotated[tuple[HeldOutSource, ...], Tag(MIXTURE)], _Form
]


class Data(Frozen):
    train: Training
    """One source, or a list of several that every rollout mixes by their weights (docs/mixtures.md)."""
    evaluation: HeldOut | None = None
    """Held-out problems: one source, or a list of several."""
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

    def sources_of(self, stage: Stage) -> dict[str, Source | HeldOutSource]:
        """What is to be read, by its key: one source, each of a list, or none."""
        given: Source | tuple[HeldOutSource, ...] | None = getattr(self, stage)
        key = f"data.{stage}"
        if isinstance(given, tuple):
            return {f"{key}.{place}": source for place, source in enumerate(given)}
        return {key: given} if given else {}

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for stage in ("train", "evaluation"):
            given = getattr(self, stage)
            if not isinstance(given, tuple):
                continue
            if not given:
                raise ConfigError(f"data.{stage} is an empty list: name at least one source")
            for name, times in Counter(source.name for source in given).items():
                if times > 1:
                    raise ConfigError(
                        f"data.{stage} has {times} sources named {name!r}: metrics could not tell them "
                        "apart; give each its own name"
                    )
        return self

    @model_validator(mode="after")
    def _difficulty(self) -> Self:
        if self.sampling != "curriculum":
            return self
        for key, given in self.sources_of("train").items():
            source, key = (
                (given.source, f"{key}.source") if isinstance(given, HeldOutSource) else (given, key)
            )
            if not isinstance(source, FileSource) or source.difficulty_key is None:
                raise ConfigError(
                    f"data.sampling=curriculum needs {key}.difficulty_key, a column of the file"
                )
        return self

    @model_validator(mode="after")
    def _of_the_template(self) -> Self:
        _refuse_rendered(self.template_arguments, "data.template_arguments")
        return self


def _refuse_rendered(arguments: dict[str, Any], where: str) -> None:
    for name in arguments.keys() & RENDERED:
        raise ConfigError(f"{where}.{name}: it is given to the chat template by this program; remove it")


@dataclass(frozen=True)
class ProblemSource:
    """A source of problems with all that holds for it: its own settings, else the run's."""

    key: str
    """The setting that it stands under: data.train, data.train.0, …"""
    name: str
    """Of a list's source; "" for the only one."""
    source: Source
    data: Data
    """How its problems are asked: system prompt, suffix, template arguments."""
    reward: Reward
    max_prompt_tokens: int
    limited_by: str = "batch.max_prompt_tokens"
    """The setting that max_prompt_tokens is of."""
    max_response_tokens: int | None = None
    """None: the run's."""
    weight: float = 1.0
    tau: float | None = None
    """None: the run's."""

    @classmethod
    def of(
        cls, key: str, given: Source | HeldOutSource, data: Data, reward: Reward, max_prompt_tokens: int
    ) -> ProblemSource:
        """given: as the configuration has it; the others are the run's, for what it does not set."""
        if not isinstance(given, HeldOutSource):
            return cls(key, "", given, data, reward, max_prompt_tokens)
        asked = {name: getattr(given, name) for name in ASKED if getattr(given, name) is not None}
        mixed = given if isinstance(given, TrainingSource) else None
        return cls(
            key,
            given.name,
            given.source,
            data.model_copy(update=asked),
            given.reward or reward,
            given.max_prompt_tokens or max_prompt_tokens,
            f"{key}.max_prompt_tokens" if given.max_prompt_tokens else cls.limited_by,
            given.max_response_tokens,
            weight=mixed.weight if mixed else 1.0,
            tau=mixed.tau if mixed else None,
        )


ASKED = ("system_prompt", "prompt_suffix", "template_arguments")
"""How a problem becomes a prompt: settings of Data that a source of a list can have of its own."""


class Evaluation(Frozen):
    every: PositiveInt | None = None
    """Iterations between evaluations; None: before the first and after the last, with data.evaluation."""
    prompts: PositiveInt = 64
    """The first so many held-out problems, of each source."""
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
