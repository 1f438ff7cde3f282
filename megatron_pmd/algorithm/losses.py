"""What an objective is given, and what becomes of the loss it returns: a sum and its normaliser.

Nothing here averages: the caller divides the global sum by the global count, so neither packing nor
parallelism can change a sequence's weight. The objectives are in objectives/. Source: docs/algorithm.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_pmd.algorithm.mismatch import Mismatch, Weight, none, none_by_token, sum_by_sequence


@dataclass(frozen=True)
class Constants:
    """What all micro-batches of an iteration share."""

    max_response_tokens: int
    """Tokens at which every response is cut."""

    def __post_init__(self) -> None:
        if not self.max_response_tokens > 0:
            raise ValueError(f"max_response_tokens must be positive, got {self.max_response_tokens}")


@dataclass(frozen=True)
class LossInput:
    """The response tokens of one micro-batch's sequences, concatenated in any order; nats."""

    log_probs: Tensor
    """[tokens] log π_θ at the sampling temperature; carries the gradient."""
    anchor_log_probs: Tensor
    """[tokens] log π_t, fixed through the iteration."""
    engine_log_probs: Tensor
    """[tokens] log π_b, as the rollout engine reported them."""
    mask: Tensor
    """[tokens] 1 for a counted token, 0 for one that is not (tool output, frozen segment, padding)."""
    sequence: Tensor
    """[tokens] int64, index of the token's sequence in this micro-batch."""
    advantages: Tensor
    """[sequences] reward minus baseline, in reward units."""
    tau: Tensor
    """[sequences] float64, regularisation strength τ > 0 of the sequence's group, in reward units."""
    teacher_log_probs: Tensor | None = None
    """[tokens] log π_T; None: there is no teacher."""

    def __post_init__(self) -> None:
        tokens = self.log_probs.shape
        names = ["log_probs", "anchor_log_probs", "engine_log_probs", "mask", "sequence"]
        for name in [*names, *(["teacher_log_probs"] if self.teacher_log_probs is not None else [])]:
            shape = getattr(self, name).shape
            if len(shape) != 1 or shape != tokens:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}, log_probs {tuple(tokens)}: both must be [tokens]"
                )
        if self.advantages.ndim != 1:
            raise ValueError(f"advantages must be [sequences], got shape {tuple(self.advantages.shape)}")
        if self.tau.shape != self.advantages.shape:
            raise ValueError(
                f"tau has shape {tuple(self.tau.shape)}, advantages {tuple(self.advantages.shape)}: both "
                "must be [sequences]"
            )

    @property
    def sequences(self) -> int:
        return len(self.advantages)

    @cached_property
    def counted(self) -> Tensor:
        """[tokens] bool."""
        return self.mask != 0

    @cached_property
    def length(self) -> Tensor:
        """[sequences] int64, counted tokens |y|."""
        return sum_by_sequence(self.counted.long(), self.sequence, self.sequences)

    # What carries a gradient is not cached: two objectives over one input would share a graph, and the first
    # backward would free it.
    @property
    def token_log_ratio(self) -> Tensor:
        """[tokens] log π_θ − log π_t, 0 where not counted; float64.

        Sums run over up to 32k tokens: in float64 the order in which atomics add them disappears when the
        gradient is rounded to the parameters' precision. A token that is not counted
        may hold anything, also −inf.
        """
        ratio = self.log_probs.double() - self.anchor_log_probs.double()
        return torch.where(self.counted, ratio, 0.0)

    @property
    def log_ratio(self) -> Tensor:
        """[sequences] s = Σ over counted tokens of log π_θ − log π_t; float64."""
        return self.sum(self.token_log_ratio)

    @property
    def teacher_residual(self) -> Tensor:
        """[tokens] log π_θ − log π_T, 0 where not counted; float64. ValueError without a teacher."""
        if self.teacher_log_probs is None:
            raise ValueError("an objective that learns from a teacher has no teacher_log_probs")
        return torch.where(self.counted, self.log_probs.double() - self.teacher_log_probs.double(), 0.0)

    @cached_property
    def mismatch(self) -> Mismatch:
        """log π_t − log π_b, detached."""
        difference = self.anchor_log_probs.detach().double() - self.engine_log_probs.detach().double()
        return Mismatch(torch.where(self.counted, difference, 0.0), self.sequence, self.length)

    @property
    def counted_log_probs(self) -> Tensor:
        """[tokens] log π_θ, 0 where not counted; float64."""
        return torch.where(self.counted, self.log_probs.double(), 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[sequences] Σ of `values` [tokens] over each sequence."""
        return sum_by_sequence(values, self.sequence, self.sequences)

    def by_token(self, values: Tensor) -> Tensor:
        """[tokens] each token's entry of `values` [sequences]; float64."""
        return values.double()[self.sequence]


@dataclass(frozen=True)
class LossTerms:
    sum: Tensor
    """Scalar, float64: the loss summed over what `count` counts."""
    count: Tensor
    """Scalar, int64: sequences for a sequence loss, counted tokens for a token loss."""
    per_sequence: dict[str, Tensor]
    """Detached float64 [sequences], for diagnostics:

    loss              this sequence's share of `sum`
    weight            w, mismatch weight (token losses: its mean over the counted tokens)
    log_ratio         s = Σ x with x = log π_θ − log π_t
    length            counted tokens
    kl_k2, kl_k3      Σ x²/2 and Σ (eˣ − 1 − x): estimates of KL(π_t ‖ π_θ) from samples of π_t
    mismatch_sum      Σ d with d = log π_t − log π_b
    mismatch_abs_sum  Σ |d|
    mismatch_abs_max  max |d|
    """


@dataclass(frozen=True)
class Loss:
    """An objective with everything but the micro-batch given."""

    counts: Literal["sequences", "tokens"]
    """What `LossTerms.count` is a number of."""
    terms: Callable[[LossInput], LossTerms]

    def __call__(self, x: LossInput) -> LossTerms:
        return self.terms(x)


class Objective(Protocol):
    """What config.Objective is to the mathematics."""

    @property
    def counts(self) -> Literal["sequences", "tokens"]:
        """What the loss is a mean over."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[sequences] or [tokens], as `counts` says; float64, neither weighted nor averaged."""


def terms(
    objective: Objective, x: LossInput, constants: Constants, mismatch: Weight | None = None
) -> LossTerms:
    """The objective's loss with the mismatch weight, summed over what the objective counts.

    mismatch  one of mismatch.WEIGHTS[objective.counts]; None: 1

    A sequence without counted tokens adds 0 to the sum; a sequence loss counts it.
    """
    loss = objective.loss(x, constants)
    if objective.counts == "tokens":
        return token_terms(x, loss, (mismatch or none_by_token)(x.mismatch))
    return sequence_terms(x, loss, (mismatch or none)(x.mismatch))


def loss_of(objective: Objective, constants: Constants, mismatch: Weight | None = None) -> Loss:
    """`terms` with everything but the micro-batch given."""
    return Loss(objective.counts, functools.partial(terms, objective, constants=constants, mismatch=mismatch))


def _next_token(x: LossInput) -> LossTerms:
    return token_terms(x, -x.counted_log_probs, none_by_token(x.mismatch))


next_token = Loss("tokens", _next_token)
"""Negative log-likelihood −log π_θ of the counted tokens, token mean: supervised training."""


def sequence_terms(x: LossInput, loss: Tensor, weight: Tensor) -> LossTerms:
    """`loss` and `weight` are [sequences]."""
    loss = torch.where(x.length > 0, weight.detach() * loss, 0.0)
    count = torch.full((), x.sequences, dtype=torch.int64, device=loss.device)
    return LossTerms(loss.sum(), count, _per_sequence(x, loss, weight))


def token_terms(x: LossInput, loss: Tensor, weight: Tensor) -> LossTerms:
    """`loss` and `weight` are [tokens]."""
    loss = x.sum(torch.where(x.counted, weight.detach() * loss, 0.0))
    mean_weight = x.sum(torch.where(x.counted, weight.detach(), 0.0)) / x.length.clamp(min=1)
    return LossTerms(loss.sum(), x.counted.sum(), _per_sequence(x, loss, mean_weight))


def _per_sequence(x: LossInput, loss: Tensor, weight: Tensor) -> dict[str, Tensor]:
    difference = x.mismatch.log_ratio.abs()
    zeros = difference.new_zeros(x.sequences)
    ratio = x.token_log_ratio.detach()
    return {
        "loss": loss.detach(),
        "weight": weight.detach(),
        "log_ratio": x.sum(ratio),
        "length": x.length.double(),
        "kl_k2": x.sum(ratio.square() / 2),
        "kl_k3": x.sum(torch.expm1(ratio) - ratio),
        "mismatch_sum": x.mismatch.total(),
        "mismatch_abs_sum": x.sum(difference),
        "mismatch_abs_max": zeros.scatter_reduce(0, x.sequence, difference, "amax"),
    }
