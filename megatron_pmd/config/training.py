"""How much an iteration samples and trains on, what a run keeps, and how it may begin."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError


class Batch(Frozen):
    prompts_per_rollout: PositiveInt
    """Prompts sampled per iteration, over all engines."""
    samples_per_prompt: PositiveInt
    """Responses to each prompt: the group size K."""
    prompts_per_step: PositiveInt
    """Prompts in one optimizer step, over all data-parallel ranks; divides prompts_per_rollout."""
    max_tokens_per_microbatch: PositiveInt
    """Prompt and response tokens packed into one forward pass, per GPU; layout.context GPUs share a pass."""
    max_prompt_tokens: PositiveInt
    """Longer prompts are dropped and counted."""
    max_response_tokens: PositiveInt
    """A response is cut here; its finish reason is then `length`."""

    @property
    def samples_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.samples_per_prompt

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        return self.prompts_per_rollout // self.prompts_per_step

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.prompts_per_rollout % self.prompts_per_step:
            raise ConfigError(
                f"batch.prompts_per_rollout={self.prompts_per_rollout} is not a multiple of "
                f"batch.prompts_per_step={self.prompts_per_step}: a rollout must fill whole optimizer steps"
            )
        return self


class Checkpoint(Frozen):
    every: PositiveInt | None = 10
    """Iterations between checkpoints; one is always written after the last iteration. None: only that one."""
    asynchronous: bool = True
    """Written while training goes on; it is there once all its files are. It costs host memory: a copy of
    what the next steps change."""
    keep: PositiveInt = 2
    """The newest so many are kept."""
    hf_export: bool = True
    """Write the final model as a Hugging Face folder, hf/iteration-N."""
    hf_export_every: PositiveInt | None = None
    """Iterations between further such folders; all are kept. What `megatron-pmd convert` writes."""


class WarmStart(Frozen):
    """Supervised steps on the training problems' answers, before the first iteration, in the same actor; at
    temperature 1, whatever the rollouts' is."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    problems_per_step: PositiveInt
