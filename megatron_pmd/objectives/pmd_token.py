"""Policy mirror descent on tokens instead of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from megatron_pmd.algorithm.ratios import ratio
from megatron_pmd.config.algorithm import Counts, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class PmdToken(Objective):
    """PMD token by token: −ρ A + τ (log ρ)² where low ≤ log ρ ≤ high, else 0; mean of all counted tokens.

    A token outside the bounds is dropped whatever the sign of A, and its quadratic term with it.
    Source: arXiv 2602.02276.
    """

    counts: ClassVar[Counts] = "tokens"
    name: str = "pmd_token"
    log_ratio_low: float = Field(-1.0, le=0)
    """A token whose log π_θ/π_t is under this is dropped; nats. The paper names no bounds."""
    log_ratio_high: float = Field(1.0, ge=0)
    """A token whose log π_θ/π_t is over this is dropped; nats."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[tokens]"""
        log_ratio = x.token_log_ratio
        inside = (log_ratio >= self.log_ratio_low) & (log_ratio <= self.log_ratio_high)
        loss = -ratio(log_ratio) * x.by_token(x.advantages) + x.by_token(x.tau) * log_ratio.square()
        return loss.where(inside, 0.0)
