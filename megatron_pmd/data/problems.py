"""What is asked: one problem, whatever file or generator it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_pmd.config import Reward

Key = tuple[str, int]
"""Name of its source and index there: which problem of a run it is."""


@dataclass(frozen=True)
class Problem:
    """One prompt with what its reward needs to know."""

    index: int
    """Position in its source; stable between runs."""
    messages: tuple[dict[str, Any], ...]
    """Chat messages with `role`, `content` and what else their file says, the system prompt included."""
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further columns of the file, or the reasoning-gym entry."""
    tokens: tuple[int, ...] = ()
    """The rendered chat, ready for generation."""
    difficulty: float | None = None
    """The larger the harder; None where the source has no such column."""
    token_budget: int | None = None
    """Longest response, in tokens; None: the run's own limit."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given beside messages."""
    source: str = ""
    """Name of its source where a run has several."""
    reward: Reward | None = None
    """How its source's responses are graded; None: as the run's are."""

    @property
    def key(self) -> Key:
        return self.source, self.index
