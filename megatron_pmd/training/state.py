"""Where a run stands: all that changes from one iteration to the next beside the actor's own weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_pmd.rollout.groups import Group


@dataclass
class RunState:
    """What a checkpoint holds beside the actor, and a resumed run goes on from.

    Every rank counts the iterations; the other values are the driver's.
    """

    completed: int = 0
    """Iterations whose optimizer steps are all taken; also the version of the weights that came out."""
    resumed: bool = False
    """Whether this start goes on from a checkpoint."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """ProblemSets.state(): which problems are drawn."""
    carried_over: list[Group] = field(default_factory=list)
    """Responses, of these problems, that the next rollout continues. While an iteration is under way: those
    it began with, and once it has drawn, all that it has."""
    ahead: list[Group] = field(default_factory=list)
    """Of these problems, too: what is sampled for later iterations while others are trained on."""


@dataclass
class Iteration:
    """One iteration while it is under way; what it logs is the driver's."""

    number: int
    left_over: list[Group]
    """Responses that the next iteration continues."""
    sampled_tokens: int | None = None
    """By the engines, for its rollout; None: there were none."""
    values: dict[str, float] = field(default_factory=dict)
    """What its line in metrics.jsonl will say."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """The same of each optimizer step."""
