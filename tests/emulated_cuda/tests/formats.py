"""Quantising as its formats define it, in float64 with the casts of ml_dtypes.

The references are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

Matrix = np.ndarray[Any, np.dtype[Any]]
TYPES: dict[str, Any] = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
LARGEST = {"E4M3": 448.0, "E5M2": 57344.0}


def matrix(tensor: torch.Tensor) -> Matrix:
    """float64 of a tensor of whatever device and type."""
    return tensor.detach().cpu().double().numpy()


def codes(values: Matrix, form: str) -> Matrix:
    """Bytes: to the nearest, ties to the even one, and no farther than the largest."""
    limit = LARGEST[form]
    return np.clip(values, -limit, limit).astype(np.float32).astype(TYPES[form]).view(np.uint8)


def decoded(bytes_: Matrix, form: str) -> Matrix:
    return bytes_.view(TYPES[form]).astype(np.float64)


def tensor_scale(block: Matrix, form: str) -> float:
    """fp32: largest / largest magnitude; 1 where there is none."""
    amax = np.abs(block).max(initial=0.0)
    return float(np.float32(LARGEST[form]) / np.float32(amax)) if amax else 1.0


def power_of_two_scale(block: Matrix, form: str) -> float:
    """tensor_scale down to a power of two."""
    return float(2.0 ** np.floor(np.log2(tensor_scale(block, form))))


def mx_scale(block: Matrix, form: str) -> float:
    """One over the least power of two that brings the block below largest (OCP MX, rounded up)."""
    amax = np.abs(block).max(initial=0.0)
    return (
        float(2.0 ** -np.ceil(np.log2(np.float32(amax) * np.float32(1 / LARGEST[form]))))
        if amax
        else 2.0**127
    )


def by_blocks(
    values: Matrix, form: str, block: tuple[int, int], scale_of: Callable[[Matrix, str], float] = tensor_scale
) -> tuple[Matrix, Matrix]:
    """(bytes, scale of each block); a block beyond the edge is smaller."""
    high, wide = -(-values.shape[0] // block[0]), -(-values.shape[1] // block[1])
    found, scales = np.empty(values.shape, np.uint8), np.empty((high, wide))
    for i in range(high):
        for j in range(wide):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = scale_of(values[part], form)
            # the kernels multiply in fp32
            product = values[part].astype(np.float32) * np.float32(scales[i, j])
            found[part] = codes(product, form)
    return found, scales


def rounded(
    values: Matrix, form: str, block: tuple[int, int], scale_of: Callable[[Matrix, str], float] = tensor_scale
) -> Matrix:
    """The values as the format keeps them."""
    found, scales = by_blocks(values, form, block, scale_of)
    spread = np.kron(scales, np.ones(block))[: values.shape[0], : values.shape[1]]
    return decoded(found, form) / spread


def relative(found: torch.Tensor | Matrix, expected: torch.Tensor | Matrix) -> float:
    """Norm of the difference over the norm of what is expected."""
    a, b = (matrix(x) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
