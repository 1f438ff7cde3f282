"""A response in the making: what the engines gave of it, turn by turn, and what was inserted between."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_pmd.batch import NOT_SAMPLED, Segment
from megatron_pmd.config import Repetition
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import EngineError

INSERTED = "inserted"
"""Finish reason of a turn that no engine made."""


@dataclass
class Turn:
    """Response tokens of one origin: an engine's answer, perhaps in several pieces, or an insertion."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    log_probs: array[float] = field(default_factory=lambda: array("f"))
    """log π_b of each token, fp32 as the loss wants it; 0 for inserted ones."""
    segments: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, weight version), in order; neighbours differ in version."""
    finish: str | None = None
    """`stop`, `length`, `repetition` or INSERTED; None: not finished yet."""

    @classmethod
    def insertion(cls, tokens: Sequence[int]) -> Turn:
        zeros = array("f", bytes(4 * len(tokens)))
        return cls(array("i", tokens), zeros, [(len(tokens), NOT_SAMPLED)], INSERTED)

    def extend(self, tokens: Sequence[int], log_probs: Sequence[float], weight_version: int) -> None:
        """Take over what an engine has sampled further. EngineError if the two are not equally long."""
        if len(tokens) != len(log_probs):
            raise EngineError(f"an engine gave {len(log_probs)} log-probabilities for {len(tokens)} tokens")
        self.tokens.extend(tokens)
        self.log_probs.extend(log_probs)
        if not tokens:
            return
        if self.segments and self.segments[-1][1] == weight_version:
            self.segments[-1] = (self.segments[-1][0] + len(tokens), weight_version)
        else:
            self.segments.append((len(tokens), weight_version))


@dataclass
class Trajectory:
    """One response to one prompt, unfinished or graded. Survives iterations, and a checkpoint."""

    problem: Problem
    number: int
    """Which response of its group, from 0."""
    seed: int
    turns: list[Turn] = field(default_factory=list)
    response: str = ""
    """Decoded when finished."""
    reward: float | None = None
    """None: not finished."""
    reward_error: str | None = None
    stopped: str | None = None
    """Why it was not finished when last worked on."""
    routed_experts: bytes | None = None
    """As in Sample, of the engine's last answer: of all tokens it was asked with and gave, but the last."""

    @property
    def finished(self) -> bool:
        return self.reward is not None

    @property
    def finish_reason(self) -> str:
        """The last sampled turn's."""
        return next((t.finish for t in reversed(self.turns) if t.finish not in (None, INSERTED)), "") or ""

    @property
    def length(self) -> int:
        """Response tokens so far."""
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns if turn.finish != INSERTED)

    @property
    def tokens(self) -> list[int]:
        """Prompt and response, exactly as the engines were given and gave them."""
        return [*self.problem.tokens, *(token for turn in self.turns for token in turn.tokens)]

    @property
    def first_version(self) -> int | None:
        """The oldest weights that sampled of it; None: nothing is sampled yet."""
        versions = [v for turn in self.turns for _, v in turn.segments if v != NOT_SAMPLED]
        return versions[0] if versions else None

    @property
    def last_version(self) -> int | None:
        versions = [v for turn in self.turns for _, v in turn.segments if v != NOT_SAMPLED]
        return versions[-1] if versions else None

    def segments(self, counted_from: int) -> list[Segment]:
        """Its response by origin; tokens sampled under weights before `counted_from` do not count."""
        return [
            Segment(tokens, version, counted=version != NOT_SAMPLED and version >= counted_from)
            for turn in self.turns
            for tokens, version in turn.segments
        ]


def repeats(tokens: Sequence[int], rule: Repetition) -> bool:
    """Whether the last window_tokens are one sequence at least min_repeats times over."""
    window = rule.window_tokens
    if len(tokens) < window:
        return False
    tail = tokens[len(tokens) - window :]
    # a sequence has period p exactly if it equals itself shifted by p
    return any(tail[p:] == tail[:-p] for p in range(1, window // rule.min_repeats + 1))
