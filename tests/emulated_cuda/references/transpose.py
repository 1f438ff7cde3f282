"""Transposes. Answers csrc/extensions/transpose.cpp (without NVFP4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .allocate import transposed
from .host import host, on_device
from .quantise import turned
from .registry import reference


@reference("fp8_transpose")
def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    """[columns, *rows] of bytes whose rows are all dimensions but the last; dtype plays no part."""
    if out is None:
        out = torch.empty(transposed(input.shape), dtype=torch.uint8, device=input.device)
    if input.numel():
        host(out).copy_(turned(host(input)).reshape(out.shape))
    return out


@reference("swap_first_dims")
def swap_first_dims(tensor: Tensor, *, out: Tensor | None) -> Tensor:
    """[b, a, ...] of [a, b, ...]."""
    if tensor.dim() < 2:
        raise RuntimeError(f"Invalid input tensor dimensions (shape={list(tensor.shape)})")
    swapped = host(tensor).transpose(0, 1)
    if out is None:
        return on_device(swapped, tensor.dtype, tensor.device)
    # The kernel takes both for [a, b, rest]: out may have its first two dimensions as one.
    host(out).copy_(swapped.reshape(out.shape))
    return out
