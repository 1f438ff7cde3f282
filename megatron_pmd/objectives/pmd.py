"""Policy mirror descent: the objective that this project is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_pmd.config.algorithm import Counts, Objective
from megatron_pmd.objectives.normaliser import Normaliser, divisor

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Pmd(Objective):
    """Squared regression of the sequence log-ratio on the scaled advantage: (τ/2)(s − A/τ)² / n.

    The gradient at s = 0 is −A ∇s / n for every τ. Source: arXiv 2501.12599 eq. 3; docs/algorithm.md,
    "The loss".
    """

    counts: ClassVar[Counts] = "sequences"
    name: str = "pmd"
    normaliser: Normaliser = "response"
    """n, what a sequence's loss is divided by: its own counted tokens, max_response_tokens, or 1."""
    scaling: Literal["gradient", "regression"] = "gradient"
    """`gradient`: (τ/2)(s − A/τ)². `regression`: ½(s − A/τ)², the same at 1/τ times the learning rate."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[sequences]"""
        tau = x.tau
        residual = x.advantages.double() - tau * x.log_ratio
        if self.scaling == "gradient":
            loss = residual.square() / (2 * tau)
        else:
            loss = (residual / tau).square() / 2
        return loss / divisor(x, self.normaliser, constants)
