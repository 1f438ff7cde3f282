"""What pmd, reinforce and distillation divide a sequence's loss by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput

Normaliser = Literal["response", "max_response", "none"]


def divisor(x: LossInput, normaliser: Normaliser, constants: Constants) -> Tensor | int:
    """n: `response` |y| [sequences], `max_response` the tokens at which every response is cut, `none` 1."""
    if normaliser == "response":
        return x.length.clamp(min=1)
    return constants.max_response_tokens if normaliser == "max_response" else 1
