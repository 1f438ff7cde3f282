"""The gradient of a bias beside the quantised gradient. Answers csrc/extensions/bias.cpp (dbias_d* are in activations.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .allocate import empty, rows_and_columns
from .quantise import store
from .registry import reference


def sum_of_rows(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """[columns] in dtype, summed in fp32."""
    return gradient.reshape(rows_and_columns(gradient.shape)).float().sum(0).to(dtype)


@reference("bgrad_quantize")
def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """[gradient of the bias, quantised gradient]."""
    gradient = input.contiguous()
    bias = sum_of_rows(gradient, gradient.dtype)
    if quantizer is None:
        return [bias, gradient]
    target = empty(quantizer, gradient.shape, gradient.dtype, gradient.device)
    store(gradient, quantizer, target, source=gradient.dtype)
    return [bias, target]
