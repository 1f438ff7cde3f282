"""The order in which a Blackwell GEMM reads E8M0 scales: tiles of 128 x 4 bytes.

Answers csrc/extensions/swizzle.cpp and transformer_engine/common/swizzle/swizzle.cu. The layout is that of
cuBLAS's "1D Block Scaling Factors Layout": in a tile, the byte of row r and column c lies at (r % 32) * 16 +
(r // 32) * 4 + c; tiles follow each other along the columns, then down. Scales of columns are tiled as their
transpose.
"""

from __future__ import annotations

from torch import Tensor

HIGH, WIDE = 128, 4


def swizzled(scales: Tensor, *, columnwise: bool) -> Tensor:
    """The scales as the GEMM reads them, in a tensor of the same shape."""
    matrix = scales.t() if columnwise else scales
    down, across = matrix.shape[0] // HIGH, matrix.shape[1] // WIDE
    tiles = matrix.reshape(down, 4, 32, across, WIDE).permute(0, 3, 2, 1, 4)
    return tiles.reshape(scales.shape)


def unswizzled(scales: Tensor, *, columnwise: bool) -> Tensor:
    """The inverse of swizzled."""
    high, wide = scales.t().shape if columnwise else scales.shape
    tiles = scales.reshape(high // HIGH, wide // WIDE, 32, 4, WIDE).permute(0, 3, 2, 1, 4)
    matrix = tiles.reshape(high, wide)
    return matrix.t().contiguous() if columnwise else matrix
