"""A number that changes over the iterations of a run: τ, the sampling temperature."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["linear", "geometric", "cosine"]


def scheduled(start: float, end: float, iterations: int, t: int, shape: Shape = "linear") -> float:
    """The value at iteration t: `start` at 0, `end` from `iterations` on, in between as `shape` says.

    linear      start + x (end − start), with x = t / iterations
    geometric   start (end/start)^x: equal ratios instead of equal differences; both ends must be positive
    cosine      start + (1 − cos πx)/2 (end − start): slow at both ends

    Raises ValueError for another shape, iterations < 1, t < 0, or a geometric schedule through 0.
    """
    if iterations < 1 or t < 0:
        raise ValueError(f"a schedule needs iterations >= 1 and t >= 0, got {iterations} and {t}")
    if t == 0 or t >= iterations:
        return start if t == 0 else end
    x = t / iterations
    match shape:
        case "linear":
            return start + x * (end - start)
        case "geometric":
            if not (start > 0 and end > 0):
                raise ValueError(f"a geometric schedule needs positive ends, got {start} and {end}")
            return start * (end / start) ** x
        case "cosine":
            return start + (1 - math.cos(math.pi * x)) / 2 * (end - start)
    raise ValueError(f"shape {shape!r} is not one of linear, geometric, cosine")
