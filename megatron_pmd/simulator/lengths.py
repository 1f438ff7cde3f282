"""How long prompts and responses are: from a distribution, or as a rollout file has them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

GroupLengths = tuple[int, list[int]]
"""Tokens of a group's prompt, and of each of its responses."""


class Lengths(Protocol):
    def draw(self, chance: random.Random, responses: int) -> GroupLengths:
        """Of one group of so many responses."""

    @property
    def words(self) -> str:
        """What the lengths are, for a person."""


@dataclass(frozen=True)
class LogNormal:
    """Response lengths of a log-normal distribution, each cut at max_tokens; prompts all alike."""

    median_tokens: float
    sigma: float
    """Of the logarithm of the length; 0: all alike."""
    max_tokens: int
    prompt_tokens: int

    def draw(self, chance: random.Random, responses: int) -> GroupLengths:
        drawn = (self.median_tokens * math.exp(self.sigma * chance.gauss(0.0, 1.0)) for _ in range(responses))
        return self.prompt_tokens, [max(1, min(self.max_tokens, round(tokens))) for tokens in drawn]

    @property
    def words(self) -> str:
        return (
            f"log-normal, median {self.median_tokens:,.0f} tokens, sigma {self.sigma:g}, "
            f"cut at {self.max_tokens:,}"
        )


def log_normal_of_mean(mean_tokens: float, sigma: float, max_tokens: int, prompt_tokens: int) -> LogNormal:
    """The log-normal lengths whose mean is mean_tokens after they were cut at max_tokens.

    mean_tokens is less than max_tokens. The median is found by bisection.
    """
    low, high = 0.0, mean_tokens
    while cut_mean(high, sigma, max_tokens) < mean_tokens:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle, sigma, max_tokens) < mean_tokens else (low, middle)
    return LogNormal(high, sigma, max_tokens, prompt_tokens)


def cut_mean(median: float, sigma: float, most: float) -> float:
    """E[min(X, most)] of a log-normal X: m exp(σ²/2) Φ(d − σ) + most (1 − Φ(d)), d = ln(most / m) / σ.

    Source: the limited expected value of the log-normal distribution (Klugman, Panjer and Willmot, Loss
    Models, appendix A).
    """
    if sigma == 0 or median == 0:
        return min(median, most)
    normal, d = NormalDist(), math.log(most / median) / sigma
    return median * math.exp(sigma**2 / 2) * normal.cdf(d - sigma) + most * (1 - normal.cdf(d))


@dataclass(frozen=True)
class Recorded:
    """Lengths of groups that were sampled: one is drawn for each group, with its own responses together."""

    groups: Sequence[GroupLengths]
    source: str

    def draw(self, chance: random.Random, responses: int) -> GroupLengths:
        prompt, lengths = chance.choice(self.groups)
        if len(lengths) == responses:
            return prompt, list(lengths)
        return prompt, chance.choices(lengths, k=responses)

    @property
    def words(self) -> str:
        count = sum(len(lengths) for _, lengths in self.groups)
        return f"{count:,} responses of {len(self.groups):,} groups in {self.source}"


def recorded(path: Path) -> Recorded:
    """Lengths of a rollout file, or of all in a folder. Raises DataError where there is none."""
    from megatron_pmd.rollout_file import read_lengths

    return Recorded(read_lengths(path), str(path))
