"""Settings of the problems, of what a response to one is worth, and of evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_pmd.config.frozen import Frozen


class FileSource(Frozen):
    kind: Literal["file"] = "file"
    path: str
    """JSON lines (.jsonl) or Parquet (.parquet): one problem a row."""
    prompt_key: str = "prompt"
    """A string, or a list of chat messages with role and content."""
    answer_key: str = "answer"


class ReasoningGymSource(Frozen):
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """A reasoning-gym dataset, by name."""
    size: PositiveInt
    seed: NonNegativeInt = 0
    parameters: dict[str, Any] = {}
    """The task's own settings, e.g. min_digits."""


Source = Annotated[FileSource | ReasoningGymSource, Field(discriminator="kind")]


class Data(Frozen):
    train: Source
    evaluation: Source | None = None
    """Held-out problems."""
    system_prompt: str | None = None
    """None: what the model's chat template adds by itself."""
    prompt_suffix: str = ""
    """Appended to every problem's text, e.g. how to format the answer."""
    shuffle: bool = True


class Reward(Frozen):
    name: str
    """`math`, `reasoning_gym`, `exact`, or a `module:function`: function(response, problem) -> float."""
    answer: Literal["whole", "last_integer", "last_line"] = "whole"
    """Which part of the response is graded."""
    timeout_seconds: PositiveFloat = 10.0
    """For one sample; a reward that takes longer counts as 0."""
    workers: PositiveInt = 2
    """Processes."""


class Evaluation(Frozen):
    every: PositiveInt | None = None
    """Iterations between evaluations; None: before the first and after the last, with data.evaluation."""
    prompts: PositiveInt = 64
    """The first so many held-out problems."""
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
