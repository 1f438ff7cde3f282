"""A float64 model of each recipe: how it keeps the operands of a linear layer's three products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling

from tests.emulated_cuda.tests import formats
from tests.emulated_cuda.tests.formats import Matrix

BF16 = 4e-3
"""Relative norm of what rounding the operands of a chain of three products, and the results, leaves."""
Round = Callable[[Matrix], Matrix]


class Rounding:
    """How a recipe keeps the operands of a layer's products: by rows for some, by columns for others."""

    def __init__(self, x: tuple[Round, Round], weight: Round, gradient: tuple[Round, Round]) -> None:
        self.x, self.weight, self.gradient = x, weight, gradient

    def products(self, x: Matrix, weight: Matrix, upstream: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """(output, gradient of the input, gradient of the weight)."""
        return (
            self.x[0](x) @ self.weight(weight).T,
            self.gradient[0](upstream) @ self.weight(weight),
            self.gradient[1](upstream).T @ self.x[1](x),
        )


def whole(form: str, scale: float | None = None) -> Round:
    """One scale: given, or of the largest magnitude."""

    def keep(values: Matrix) -> Matrix:
        return formats.rounded(
            values, form, values.shape, formats.tensor_scale if scale is None else lambda *_: scale
        )

    return keep


def blocks(*block: int) -> Round:
    return lambda values: formats.rounded(values, "E4M3", (block[0], block[1]), formats.power_of_two_scale)


TENSORWISE = Rounding((whole("E4M3"),) * 2, whole("E4M3"), (whole("E5M2"),) * 2)
FIRST_STEP = Rounding((whole("E4M3", 1.0),) * 2, whole("E4M3", 1.0), (whole("E5M2", 1.0),) * 2)
"""Delayed scaling has seen nothing yet."""
BLOCKWISE = Rounding((blocks(1, 128), blocks(128, 1)), blocks(128, 128), (blocks(1, 128), blocks(128, 1)))
PLAIN = Rounding((lambda x: x,) * 2, lambda x: x, (lambda x: x,) * 2)
RECIPES: dict[str, tuple[Any, Rounding]] = {
    "bf16": (None, PLAIN),
    "delayed": (DelayedScaling, FIRST_STEP),
    "tensorwise": (Float8CurrentScaling, TENSORWISE),
    "blockwise": (Float8BlockScaling, BLOCKWISE),
}
