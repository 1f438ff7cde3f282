"""GRPO: the clipped surrogate on a ratio for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from megatron_pmd.algorithm.ratios import clipped_surrogate, ratio
from megatron_pmd.config.algorithm import Counts, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.baselines import Floats
    from megatron_pmd.algorithm.losses import Constants, LossInput


class Grpo(Objective):
    """Clipped surrogate on the token ratio ρ: −min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β k3, token mean.

    k3 = 1/ρ − 1 + log ρ is GRPO's estimator of KL(π_θ ‖ π_t): the reference policy is the anchor.
    Source: arXiv 2402.03300 eqs. 3 and 4; token mean and clip-higher: arXiv 2503.14476.
    """

    counts: ClassVar[Counts] = "tokens"
    name: str = "grpo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    """ρ is clipped at 1 − this."""
    clip_high: PositiveFloat = 0.28
    """ρ is clipped at 1 + this."""
    kl_coefficient: NonNegativeFloat = 0.0
    """β of the k3 estimate of KL(π_θ ‖ π_t)."""
    divide_by_deviation: bool = False
    """Advantages over the standard deviation of their group's."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[tokens]"""
        log_ratio = x.token_log_ratio
        advantage = x.by_token(x.advantages)
        loss = -clipped_surrogate(ratio(log_ratio), advantage, self.clip_low, self.clip_high)
        if self.kl_coefficient:
            loss = loss + self.kl_coefficient * (ratio(-log_ratio) - 1 + log_ratio)
        return loss

    def advantages(self, values: Floats, groups: list[int]) -> Floats:
        """Over their group's deviation, if so told."""
        from megatron_pmd.algorithm.baselines import per_standard_deviation  # numpy: not on a login node

        return per_standard_deviation(values, groups) if self.divide_by_deviation else values
