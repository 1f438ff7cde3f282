"""Settings of the engines, and of the way the weights take to them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.algorithm import Schedule
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError


class GroupFilter(Frozen):
    """A group that teaches nothing is dropped and the next prompt sampled in its place."""

    drop_equal_rewards: bool = True
    """Drop a group whose rewards are all the same: its advantages are 0."""
    mean_reward_above: float | None = None
    """Keep only groups whose mean reward is greater than this."""
    mean_reward_below: float | None = None
    """Keep only groups whose mean reward is less than this."""
    max_dropped: NonNegativeInt
    """Groups dropped in one rollout at most; from then on all are taken as they come."""


class PartialRollouts(Frozen):
    """Unfinished responses are stopped, kept, and continued first in the next iteration."""

    extra_groups: NonNegativeInt = 0
    """Groups in flight beyond prompts_per_rollout; the rollout ends when prompts_per_rollout are complete."""
    deadline_seconds: PositiveFloat | None = None
    """The rollout ends so long after its start with the groups then complete, in whole optimizer steps; if
    there are not enough for one step, when there are."""
    max_new_tokens: PositiveInt | None = None
    """Tokens sampled of one response in one iteration."""
    max_staleness: PositiveInt = 4
    """A response begun more than so many iterations ago is thrown away and sampled anew."""
    count_earlier_segments: bool = True
    """Whether tokens sampled under earlier weights count in the loss."""

    @model_validator(mode="after")
    def _stops_something(self) -> Self:
        if not (self.extra_groups or self.deadline_seconds or self.max_new_tokens):
            raise ConfigError(
                "rollout.partial stops no response: set extra_groups, deadline_seconds or max_new_tokens"
            )
        return self


class Repetition(Frozen):
    """A response that repeats itself is ended, with finish reason `repetition`."""

    window_tokens: PositiveInt = 256
    """A response is looked at each time it has grown by so many tokens."""
    min_repeats: int = Field(4, ge=2)
    """It ends if its last window_tokens are one sequence of tokens at least so many times over."""

    @model_validator(mode="after")
    def _window_holds_repeats(self) -> Self:
        if self.window_tokens < self.min_repeats:
            raise ConfigError(
                f"rollout.repetition.window_tokens={self.window_tokens} cannot hold "
                f"min_repeats={self.min_repeats} of even one token"
            )
        return self


class Rollout(Frozen):
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of one engine."""
    ranks_per_engine: PositiveInt | None = None
    """Consecutive actor ranks that share one engine; None: tensor_parallel."""
    temperature: PositiveFloat = 1.0
    """Also divides the actor's logits: π is the policy at this temperature."""
    temperature_schedule: Schedule | None = None
    """Temperature over the iterations, from rollout.temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_running_requests: PositiveInt = 64
    """Requests decoded at one time, per engine."""
    max_total_tokens: PositiveInt | None = None
    """Size of each engine's KV cache; None: SGLang sizes it from free memory (not on a CPU: it takes all)."""
    threads_per_engine: PositiveInt = 1
    """CPU only: OpenMP threads of each engine."""
    start_timeout_seconds: PositiveFloat = 300.0
    request_timeout_seconds: PositiveFloat = 600.0
    """From sending a request to its last token, retries not counted."""
    retries: NonNegativeInt = 5
    """Times one request is sent again after an engine failed it."""
    function: str | None = None
    """`module:function` that makes a response of several turns (docs/rollout.md); None: one turn."""
    max_turns: PositiveInt = 8
    """Answers of the engines in one response; for `function`."""
    group_filter: GroupFilter | None = None
    partial: PartialRollouts | None = None
    repetition: Repetition | None = None
    sglang: dict[str, Any] = {}
    """Further fields of SGLang's ServerArgs, by their own names."""


class Sync(Frozen):
    bucket_megabytes: PositiveInt = 512
    """Weights move to the engines in flattened buckets of this size; two exist at a time."""
    timeout_seconds: PositiveFloat = 300.0
    """Deadline for each bucket, and for the engine's confirmation of the new version."""
    mean_log_prob_difference: PositiveFloat | None = None
    """Bound on mean |log π_actor − log π_engine| of the sampled tokens; None: 1e-5 (fp32), 1e-1 (bf16)."""
    max_log_prob_difference: PositiveFloat | None = None
    """Bound on the largest difference; None: 1e-3 (fp32), 5.0 (bf16)."""
