"""A response in the making: what the engines gave of it, turn by turn, and what was inserted between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_pmd.batch import CUT, NOT_SAMPLED, Segment
from megatron_pmd.config import Repetition
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import EngineError

INSERTED = "inserted"
"""Finish reason of a turn that no engine made."""


@dataclass(eq=False)
class Turn:
    """Response tokens of one origin: an engine's answer, perhaps in several pieces, or an insertion."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [tokens]"""
    log_probs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """fp32 [tokens]: log π_b of each token, 0 for inserted ones"""
    segments: list[Segment] = field(default_factory=list)
    """In order; neighbours differ. Which of them count, Trajectory.segments says."""
    finish: str | None = None
    """`stop`, `length`, `repetition` or INSERTED; None: not finished yet."""
    counted: bool = True
    """False: sampled, and left out of the loss."""

    @classmethod
    def insertion(cls, tokens: Sequence[int] | np.ndarray) -> Turn:
        zeros = np.zeros(len(tokens), np.float32)
        return cls(np.array(tokens, np.int32), zeros, [Segment(len(tokens), NOT_SAMPLED)], INSERTED)

    def extend(
        self, tokens: np.ndarray, log_probs: np.ndarray, weight_version: int, *, stale_cache: bool = False
    ) -> None:
        """Take over what an engine has sampled further: int32 and fp32 [tokens].

        stale_cache: see Segment. EngineError if the two are not equally long.
        """
        if len(tokens) != len(log_probs):
            raise EngineError(f"an engine gave {len(log_probs)} log-probabilities for {len(tokens)} tokens")
        if not len(tokens):
            return
        # most turns are one piece, which is not copied
        self.tokens = np.concatenate([self.tokens, tokens]) if len(self.tokens) else tokens
        self.log_probs = np.concatenate([self.log_probs, log_probs]) if len(self.log_probs) else log_probs
        further = Segment(len(tokens), weight_version, stale_cache=stale_cache)
        if self.segments and self.segments[-1] == replace(further, tokens=self.segments[-1].tokens):
            further = replace(further, tokens=self.segments.pop().tokens + len(tokens))
        self.segments.append(further)


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
    routed_experts: np.ndarray | None = None
    """As in Sample, of the engine's last answer: of all tokens it was asked with and gave, but the last."""
    teacher_log_probs: np.ndarray | None = field(init=False, default=None)
    """As in Sample, of a finished response."""
    refused: bool = False
    """The engines will not answer its prompt: it stays without a response."""
    own_prompt: tuple[int, ...] | None = field(default=None, init=False)
    """The tokens that an agent's program began with; None: the problem's."""
    branches: list[Trajectory] = field(default_factory=list, init=False)
    """Further trajectories of the same episode (docs/agents.md), which share its reward."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.problem.tokens if self.own_prompt is None else self.own_prompt

    @property
    def parts(self) -> list[Trajectory]:
        """All trajectories of the episode, this one first."""
        return [self, *self.branches]

    @property
    def episode_length(self) -> int:
        """Response tokens so far, of all parts."""
        return sum(part.length for part in self.parts)

    @property
    def truncated(self) -> bool:
        """Whether any part was cut."""
        return any(part.finish_reason in CUT for part in self.parts)

    @property
    def finished(self) -> bool:
        return self.reward is not None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to sample, graded or not; a rollout function may think otherwise."""
        return self.finished or bool(self.turns and self.turns[-1].finish)

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
        return [*self.prompt, *self.response_tokens.tolist()]

    @property
    def response_tokens(self) -> np.ndarray:
        """int32 [response]"""
        return _joined([turn.tokens for turn in self.turns], np.int32)

    @property
    def log_probs(self) -> np.ndarray:
        """fp32 [response]: of the response's tokens, as in Turn"""
        return _joined([turn.log_probs for turn in self.turns], np.float32)

    @property
    def first_version(self) -> int | None:
        """The oldest weights that sampled of it; None: nothing is sampled yet."""
        return next(iter(self.versions), None)

    @property
    def last_version(self) -> int | None:
        return next(reversed(self.versions), None)

    @property
    def versions(self) -> list[int]:
        """The weights that sampled of it, one for each segment, in order."""
        found = [segment.weight_version for turn in self.turns for segment in turn.segments]
        return [version for version in found if version != NOT_SAMPLED]

    def segments(self, counted_from: int) -> list[Segment]:
        """Its response by origin; tokens sampled under weights before `counted_from` do not count."""
        return [
            replace(segment, counted=turn.counted and NOT_SAMPLED != segment.weight_version >= counted_from)
            for turn in self.turns
            for segment in turn.segments
        ]


def _joined(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """One behind the other; of a single array, itself."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])


def repeats(tokens: Sequence[int] | np.ndarray, rule: Repetition) -> bool:
    """Whether the last window_tokens are one sequence at least min_repeats times over."""
    window = rule.window_tokens
    if len(tokens) < window:
        return False
    tail = np.asarray(tokens[len(tokens) - window :])
    # a sequence has period p exactly if it equals itself shifted by p
    return any(np.array_equal(tail[p:], tail[:-p]) for p in range(1, window // rule.min_repeats + 1))
