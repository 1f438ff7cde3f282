"""Weights that correct for the rollout engine's policy π_b not being the trainer's π_t.

The two differ by numerics (kernels, FP8, routing of experts). With d = log π_t − log π_b at a sampled token,
a sequence's importance ratio is exp(Σ d) over its counted tokens. Every weight is detached. Sequence losses
take one weight a sequence, token losses one a token. Source: docs/algorithm.md, "Engine and trainer differ".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """d = log π_t − log π_b at the sampled tokens of one micro-batch, detached."""

    log_ratio: Tensor
    """[tokens] float64, in nats; 0 where the token is not counted."""
    sequence: Tensor
    """[tokens] int64, index of the token's sequence."""
    length: Tensor
    """[sequences] int64, counted tokens."""

    def total(self) -> Tensor:
        """[sequences] Σ d over the sequence's tokens."""
        return sum_by_sequence(self.log_ratio, self.sequence, len(self.length))

    def mean(self) -> Tensor:
        """[sequences] Σ d / |y|; 0 for a sequence without counted tokens."""
        return self.total() / self.length.clamp(min=1)

    def lowest(self) -> Tensor:
        """[sequences] the smallest d, at most 0."""
        zeros = self.log_ratio.new_zeros(len(self.length))
        return zeros.scatter_reduce(0, self.sequence, self.log_ratio, "amin")


Weight = Callable[[Mismatch], Tensor]


def sum_by_sequence(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Σ of `values` [tokens] over each sequence: [sequences], in the dtype of `values`."""
    return values.new_zeros(sequences).index_add(0, sequence, values)


def none(mismatch: Mismatch) -> Tensor:
    """[sequences] 1: trust π_b to be π_t."""
    return mismatch.log_ratio.new_ones(len(mismatch.length))


def sequence_tis(mismatch: Mismatch, *, cap: float = 2.0) -> Tensor:
    """[sequences] min(exp(Σ d), cap): truncated importance sampling."""
    return _truncated(mismatch.total(), cap)


def geometric_tis(mismatch: Mismatch, *, cap: float = 2.0) -> Tensor:
    """[sequences] min(exp(Σ d / |y|), cap): the same with the mean over tokens."""
    return _truncated(mismatch.mean(), cap)


def sequence_mis(mismatch: Mismatch, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """[sequences] exp(Σ d) inside [low, high], 0 outside: masked importance sampling."""
    return _masked(mismatch.total(), low, high)


def token_veto(mismatch: Mismatch, *, lowest: float = 1e-4) -> Tensor:
    """[sequences] 0 for a sequence with a token whose ratio exp(d) is under `lowest`, else 1."""
    _interval(lowest, 1.0)
    return (mismatch.lowest() >= math.log(lowest)).to(mismatch.log_ratio.dtype)


def none_by_token(mismatch: Mismatch) -> Tensor:
    """[tokens] 1."""
    return torch.ones_like(mismatch.log_ratio)


def tis_by_token(mismatch: Mismatch, *, cap: float = 2.0) -> Tensor:
    """[tokens] min(exp(d), cap)."""
    return _truncated(mismatch.log_ratio, cap)


def mis_by_token(mismatch: Mismatch, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """[tokens] exp(d) inside [low, high], 0 outside."""
    return _masked(mismatch.log_ratio, low, high)


def veto_by_token(mismatch: Mismatch, *, lowest: float = 1e-4) -> Tensor:
    """[tokens] the weight `token_veto` gives to the token's sequence: one such token drops them all."""
    return token_veto(mismatch, lowest=lowest)[mismatch.sequence]


def _truncated(log_ratio: Tensor, cap: float) -> Tensor:
    if not cap > 0:
        raise ValueError(f"the cap of an importance weight must be positive, got {cap}")
    return log_ratio.clamp(max=math.log(cap)).exp()  # truncated before exp, which could overflow


def _masked(log_ratio: Tensor, low: float, high: float) -> Tensor:
    _interval(low, high)
    inside = (log_ratio >= math.log(low)) & (log_ratio <= math.log(high))
    return torch.where(inside, log_ratio, -math.inf).exp()


def _interval(low: float, high: float) -> None:
    if not 0 < low <= high:
        raise ValueError(f"bounds of a ratio must satisfy 0 < low <= high, got [{low}, {high}]")


SEQUENCE_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "sequence_tis": sequence_tis,
    "geometric_tis": geometric_tis,
    "sequence_mis": sequence_mis,
    "token_veto": token_veto,
}
"""For sequence losses; each also takes its bounds by keyword."""

TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "none": none_by_token,
    "token_tis": tis_by_token,
    "token_mis": mis_by_token,
    "token_veto": veto_by_token,
}
"""For token losses; each also takes its bounds by keyword."""

WEIGHTS = {"sequences": SEQUENCE_WEIGHTS, "tokens": TOKEN_WEIGHTS}
"""By what the loss counts."""
