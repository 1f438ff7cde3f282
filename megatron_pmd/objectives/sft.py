"""Supervised training on the problems' own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_pmd.config.algorithm import Counts, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.losses import Constants, LossInput


class Sft(Objective):
    """Negative log-likelihood −log π_θ of the counted tokens, token mean. There are no advantages."""

    counts: ClassVar[Counts] = "tokens"
    supervised: ClassVar[bool] = True
    name: str = "sft"

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """[tokens]"""
        return -x.counted_log_probs
