"""CISPO: the policy gradient under a clipped ratio for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from megatron_pmd.algorithm.ratios import ratio
from megatron_pmd.config.algorithm import Counts, Objective
from megatron_pmd.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Cispo(Objective):
    """Policy gradient with a clipped, detached token ratio: −sg[clip(ρ, low, high)] A log π_θ, token mean.

    Unlike a clipped surrogate no token loses its gradient. Source: arXiv 2506.13585 eqs. 4 and 5.
    """

    counts: ClassVar[Counts] = "tokens"
    name: str = "cispo"
    ratio_low: NonNegativeFloat = 0.0
    """ρ is clipped at this from below."""
    ratio_high: PositiveFloat = 5.0
    """ρ is clipped at this from above."""

    @model_validator(mode="after")
    def _is_interval(self) -> Self:
        if self.ratio_low > self.ratio_high:
            raise ConfigError(
                f"algorithm.objective: ratio_low={self.ratio_low} is over ratio_high={self.ratio_high}"
            )
        return self

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[tokens]"""
        weight = ratio(x.token_log_ratio).clamp(self.ratio_low, self.ratio_high).detach()
        return -weight * x.by_token(x.advantages) * x.counted_log_probs
