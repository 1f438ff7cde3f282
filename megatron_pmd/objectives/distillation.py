"""On-policy distillation as policy mirror descent: the target is a teacher, not a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_pmd.config.algorithm import Counts, Objective
from megatron_pmd.objectives.normaliser import Normaliser, divisor

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Distillation(Objective):
    """Squared regression of the log-ratio to the anchor on the teacher's: ½(s − d)² / n or ½ Σ (x − d)² / n.

    x = log π_θ − log π_t and d = log π_T − log π_t of a token, s their sum over a response. log π_t cancels
    in the difference. The gradient at the anchor is that of KL(π_θ ‖ π_T) / n. Source: docs/algorithm.md,
    "Teachers".
    """

    counts: ClassVar[Counts] = "sequences"
    distils: ClassVar[bool] = True
    name: str = "distillation"
    form: Literal["token", "sequence"] = "token"
    """`token`: ½ Σ (x − d)² over the response's tokens. `sequence`: ½(s − d)², of their sums; the same fixed
    point, with more variance."""
    normaliser: Normaliser = "response"
    """n, what a sequence's loss is divided by: its own counted tokens, max_response_tokens, or 1."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[sequences]"""
        residual = x.teacher_residual
        if self.form == "token":
            loss = x.sum(residual.square()) / 2
        else:
            loss = x.sum(residual).square() / 2
        return loss / divisor(x, self.normaliser, constants)
