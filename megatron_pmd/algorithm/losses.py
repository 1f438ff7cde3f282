"""The objectives: pure functions from the log-probabilities of one micro-batch to a sum and its normaliser.

Sequence losses (`pmd`, `reinforce`, `gspo`) count sequences, token losses (`pmd_token`, `grpo`, `cispo`,
`sft`) count tokens. No function averages: the caller divides the global sum by the global count, so neither
packing nor parallelism can change a sequence's weight. Source: docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megatron_pmd.algorithm.mismatch import Mismatch, Weight, none, none_by_token, sum_by_sequence

RATIO_LIMIT = 20.0
"""Objectives with a ratio treat a log-ratio beyond ±20 as ±20, without gradient: no clip range reaches e^20,
and e^90 would overflow an fp32 gradient."""


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

    def __post_init__(self) -> None:
        tokens = self.log_probs.shape
        for name in ("log_probs", "anchor_log_probs", "engine_log_probs", "mask", "sequence"):
            shape = getattr(self, name).shape
            if len(shape) != 1 or shape != tokens:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}, log_probs {tuple(tokens)}: both must be [tokens]"
                )
        if self.advantages.ndim != 1:
            raise ValueError(f"advantages must be [sequences], got shape {tuple(self.advantages.shape)}")

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

    @cached_property
    def mismatch(self) -> Mismatch:
        """log π_t − log π_b, detached."""
        difference = self.anchor_log_probs.detach().double() - self.engine_log_probs.detach().double()
        return Mismatch(torch.where(self.counted, difference, 0.0), self.sequence, self.length)

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


Objective = Callable[[LossInput], LossTerms]
"""A loss with its settings given."""


def pmd(
    x: LossInput,
    *,
    tau: float,
    normaliser: Literal["response", "max_response", "none"] = "response",
    max_response_tokens: int | None = None,
    scaling: Literal["gradient", "regression"] = "gradient",
    mismatch: Weight = none,
) -> LossTerms:
    """Squared regression of the sequence log-ratio on the scaled advantage: w (τ/2)(s − A/τ)² / n.

    tau                  regularisation strength τ > 0, in reward units
    normaliser           n: `response` |y|, `max_response` max_response_tokens, `none` 1
    max_response_tokens  required by, and only used by, `max_response`
    scaling              `gradient`: as above; the gradient at s = 0 is −A ∇s for every τ
                         `regression`: ½(s − A/τ)², the same with the learning rate scaled by 1/τ
    mismatch             gives w, see mismatch.SEQUENCE_WEIGHTS

    A sequence without counted tokens adds 0 to the sum and 1 to the count. Raises ValueError
    for other values. Source: arXiv 2501.12599 eq. 3; docs/algorithm.md, "The loss".
    """
    _positive("tau", tau)
    residual = x.advantages.double() - tau * x.log_ratio
    match scaling:
        case "gradient":
            loss = residual.square() / (2 * tau)
        case "regression":
            loss = (residual / tau).square() / 2
        case _:
            raise ValueError(f"scaling {scaling!r} is not one of gradient, regression")
    return _sequence_terms(x, loss / _normaliser(x, normaliser, max_response_tokens), mismatch(x.mismatch))


def reinforce(
    x: LossInput,
    *,
    normaliser: Literal["response", "max_response", "none"] = "none",
    max_response_tokens: int | None = None,
    mismatch: Weight = none,
) -> LossTerms:
    """The policy gradient: −w A s / n, whose gradient is that of −w A log π_θ / n. With `mean_loo`: RLOO.

    Arguments as for `pmd`. Source: Williams 1992; RLOO: arXiv 2402.14740.
    """
    loss = -x.advantages.double() * x.log_ratio
    return _sequence_terms(x, loss / _normaliser(x, normaliser, max_response_tokens), mismatch(x.mismatch))


def gspo(
    x: LossInput, *, clip_low: float = 3e-4, clip_high: float = 4e-4, mismatch: Weight = none
) -> LossTerms:
    """Clipped surrogate on the geometric ratio ρ = exp(s/|y|): −w min(ρ A, clip(ρ, 1 − low, 1 + high) A).

    Source: arXiv 2507.18071, eqs. 5 and 7, and its clip range.
    """
    ratio = _ratio(x.log_ratio / x.length.clamp(min=1))
    advantage = x.advantages.double()
    return _sequence_terms(x, -_clipped(ratio, advantage, clip_low, clip_high), mismatch(x.mismatch))


def grpo(
    x: LossInput,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coefficient: float = 0.0,
    mismatch: Weight = none_by_token,
) -> LossTerms:
    """Clipped surrogate on the token ratio ρ: w [−min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β k3], token mean.

    k3 = 1/ρ − 1 + log ρ is GRPO's estimator of KL(π_θ ‖ π_t): the reference policy is the anchor, β is
    `kl_coefficient`. The optional division of A by its group's deviation is baselines.per_standard_deviation.
    Source: arXiv 2402.03300 eqs. 3 and 4; token mean and clip-higher: arXiv 2503.14476.
    """
    log_ratio = x.token_log_ratio
    ratio = _ratio(log_ratio)
    loss = -_clipped(ratio, x.by_token(x.advantages), clip_low, clip_high)
    if kl_coefficient:
        loss = loss + kl_coefficient * (_ratio(-log_ratio) - 1 + log_ratio)
    return _token_terms(x, loss, mismatch(x.mismatch))


def cispo(
    x: LossInput, *, ratio_low: float = 0.0, ratio_high: float = 5.0, mismatch: Weight = none_by_token
) -> LossTerms:
    """Policy gradient with a clipped, detached token ratio: −w sg[clip(ρ, low, high)] A log π_θ, token mean.

    Unlike a clipped surrogate no token loses its gradient. Source: arXiv 2506.13585 eqs. 4 and 5.
    """
    weight = _ratio(x.token_log_ratio).clamp(ratio_low, ratio_high).detach()
    log_probs = torch.where(x.counted, x.log_probs.double(), 0.0)
    return _token_terms(x, -weight * x.by_token(x.advantages) * log_probs, mismatch(x.mismatch))


def pmd_token(
    x: LossInput, *, tau: float, log_ratio_low: float, log_ratio_high: float, mismatch: Weight = none_by_token
) -> LossTerms:
    """PMD token by token: w [−ρ A + τ (log ρ)²] where low ≤ log ρ ≤ high, else 0; mean of all counted tokens.

    A token outside the bounds is dropped whatever the sign of A, and its quadratic term with it.
    Source: arXiv 2602.02276.
    """
    _positive("tau", tau)
    if not log_ratio_low <= 0 <= log_ratio_high:
        raise ValueError(f"bounds of the log-ratio must contain 0, got [{log_ratio_low}, {log_ratio_high}]")
    log_ratio = x.token_log_ratio
    inside = (log_ratio >= log_ratio_low) & (log_ratio <= log_ratio_high)
    loss = -_ratio(log_ratio) * x.by_token(x.advantages) + tau * log_ratio.square()
    return _token_terms(x, torch.where(inside, loss, 0.0), mismatch(x.mismatch))


def sft(x: LossInput) -> LossTerms:
    """Negative log-likelihood −log π_θ of the counted tokens, token mean. Advantages are not used."""
    log_probs = torch.where(x.counted, x.log_probs.double(), 0.0)
    return _token_terms(x, -log_probs, none_by_token(x.mismatch))


def _sequence_terms(x: LossInput, loss: Tensor, weight: Tensor) -> LossTerms:
    """`loss` and `weight` are [sequences]."""
    loss = torch.where(x.length > 0, weight.detach() * loss, 0.0)
    count = torch.full((), x.sequences, dtype=torch.int64, device=loss.device)
    return LossTerms(loss.sum(), count, _per_sequence(x, loss, weight))


def _token_terms(x: LossInput, loss: Tensor, weight: Tensor) -> LossTerms:
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


def _normaliser(x: LossInput, name: str, max_response_tokens: int | None) -> Tensor | int:
    match name:
        case "response":
            return x.length.clamp(min=1)
        case "max_response":
            if not max_response_tokens:
                raise ValueError("normaliser max_response needs max_response_tokens, a positive number")
            return max_response_tokens
        case "none":
            return 1
    raise ValueError(f"normaliser {name!r} is not one of response, max_response, none")


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-RATIO_LIMIT, RATIO_LIMIT).exp()


def _clipped(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


OBJECTIVES: dict[str, Callable[..., LossTerms]] = {
    "pmd": pmd,
    "pmd_token": pmd_token,
    "reinforce": reinforce,
    "grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "sft": sft,
}

TOKEN_OBJECTIVES = frozenset({"pmd_token", "grpo", "cispo", "sft"})
"""Those whose `mismatch` is one of mismatch.TOKEN_WEIGHTS and whose count is in tokens."""
