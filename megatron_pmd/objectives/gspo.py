"""GSPO: the clipped surrogate on one ratio a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from megatron_pmd.algorithm.ratios import clipped_surrogate, ratio
from megatron_pmd.config.algorithm import Counts, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Gspo(Objective):
    """Clipped surrogate on the geometric ratio ρ = exp(s/|y|): −min(ρ A, clip(ρ, 1 − low, 1 + high) A).

    Source: arXiv 2507.18071, eqs. 5 and 7, and its clip range.
    """

    counts: ClassVar[Counts] = "sequences"
    name: str = "gspo"
    clip_low: float = Field(3e-4, gt=0, lt=1)
    """ρ is clipped at 1 − this."""
    clip_high: PositiveFloat = 4e-4
    """ρ is clipped at 1 + this."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[sequences]"""
        geometric = ratio(x.log_ratio / x.length.clamp(min=1))
        return -clipped_surrogate(geometric, x.advantages.double(), self.clip_low, self.clip_high)
