"""Importance ratios of the objectives that have one. Uses only tensors' methods, so it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RATIO_LIMIT = 20.0
"""Objectives with a ratio treat a log-ratio beyond ±20 as ±20, without gradient: no clip range reaches e^20,
and e^90 would overflow an fp32 gradient."""


def ratio(log_ratio: Tensor) -> Tensor:
    """ρ = exp(log ρ), with log ρ held within ±RATIO_LIMIT."""
    return log_ratio.clamp(-RATIO_LIMIT, RATIO_LIMIT).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(ρ A, clip(ρ, 1 − low, 1 + high) A). Source: PPO, arXiv 1707.06347, eq. 7."""
    return (ratio * advantage).minimum(ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
