"""Scales from largest magnitudes, and the parts of a parameter that its owner quantises.

Answers csrc/extensions/recipe.cpp, fp8_partial_cast.cpp and multi_tensor/compute_scale.cpp, and the kernels
in transformer_engine/common/recipe and common/multi_tensor/compute_scale.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import BLOCK
from .float8 import LARGEST_FP32, encode, largest, magnitude, scale_from_amax
from .host import fp32, host
from .quantise import tiles
from .registry import reference


@reference("compute_amax")
def compute_amax(input: Tensor, amax: Tensor) -> None:
    """The largest magnitude, in place of what amax [1] held."""
    host(amax).fill_(magnitude(fp32(input)) if input.numel() else 0.0)


@reference("fused_amax_and_scale_update_after_reduction")
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling, after a step: roll each history [length, tensors], and set the scales [tensors].

    Row 0 collects during a step. Rolled, it is the last row, the others move up, and row 0 is 0. A tensor
    without a magnitude this time keeps its history. The scale is largest / amax / 2**margin, of the largest
    in the history ("max") or of this step ("most_recent"); it stays where that is 0 or not finite
    (kernel_bulk of delayed_scaling.cu).
    """
    if amax_compute_algo not in {"max", "most_recent"}:
        raise RuntimeError(f"Unsupported amax compute algorithm ({amax_compute_algo})")
    scaled_max = largest(fp8_dtype) * 2.0**-margin
    start = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        history, scale = host(history), host(scale)
        reduced = host(amax_reduction_buffer).reshape(-1)[start : start + history.shape[1]]
        start += history.shape[1]
        last = torch.where(reduced != 0, reduced, history[0])
        rolled = torch.cat([torch.zeros_like(last)[None], history[2:], last[None]])[-history.shape[0] :]
        if history.shape[0] == 1:
            rolled = torch.zeros_like(history)
        seen = torch.cat([history[1:], last[None]]).amax(0)
        # Without a magnitude this time the kernel looks at no history either: "max" then gives 0.
        amax = last if amax_compute_algo == "most_recent" else torch.where(last != 0, seen, 0.0)
        history.copy_(torch.where(last != 0, rolled, history))
        new = (torch.full_like(amax, scaled_max) / amax).clamp(max=LARGEST_FP32)
        scale.copy_(torch.where(amax.isfinite() & (amax > 0), new, scale))


@reference("multi_tensor_compute_scale_and_scale_inv")
def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    max_fp8: float,
    force_pow_2_scales: bool,
    epsilon: float,
) -> None:
    """Lists of amax, scale and its inverse; the flag plays no part."""
    for amax, scale, scale_inv in zip(*tensor_lists, strict=True):
        new = scale_from_amax(fp32(amax), max_fp8, power_of_two=force_pow_2_scales, epsilon=epsilon)
        host(scale).copy_(new)
        host(scale_inv).copy_(new.reciprocal())


def _whole(part: Tensor, rows: int, columns: int, start: int) -> Tensor:
    """fp32 [rows, columns] with the part at its place in the flattened matrix, and else 0."""
    matrix = torch.zeros(rows * columns)
    matrix[start : start + part.numel()] = fp32(part).reshape(-1)
    return matrix.reshape(rows, columns)


@reference("fp8_block_scaling_compute_partial_amax")
def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Largest magnitude of each 128 x 128 block of a parameter [h, w], of which this rank owns a part."""
    found = magnitude(tiles(_whole(tensor, h, w, start_offset), BLOCK, BLOCK), (1, 3))
    host(amax)[: found.shape[0], : found.shape[1]] = found


@reference("fp8_block_scaling_partial_cast")
def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    """The owned part's bytes, with the scale of each block.

    The kernel also writes beside the part, in its rows of the block: what the gather after it overwrites.
    """
    each = host(scale).repeat_interleave(BLOCK, 0)[:h].repeat_interleave(BLOCK, 1)[:, :w]
    factor = each.reshape(-1)[start_offset : start_offset + inp.numel()]
    host(out).copy_(encode(fp32(inp).reshape(-1) * factor, out_dtype).reshape(out.shape))
