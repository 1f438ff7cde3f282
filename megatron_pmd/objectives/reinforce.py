"""The policy gradient without a ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_pmd.config.algorithm import Counts, Objective
from megatron_pmd.objectives.normaliser import Normaliser, divisor

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Reinforce(Objective):
    """−A s / n, whose gradient is that of −A log π_θ / n. With baseline `mean_loo` and n = 1: RLOO.

    Source: Williams 1992; RLOO: arXiv 2402.14740.
    """

    counts: ClassVar[Counts] = "sequences"
    name: str = "reinforce"
    normaliser: Normaliser = "response"
    """n, what a sequence's loss is divided by: its own counted tokens, max_response_tokens, or 1."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[sequences]"""
        return -x.advantages.double() * x.log_ratio / divisor(x, self.normaliser, constants)
