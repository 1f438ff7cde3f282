"""The gradient of a bias beside the quantised gradient.

Answers csrc/extensions/bias.cpp (without dbias_d*).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .allocate import empty, rows_and_columns
from .host import fp32, on_device
from .quantise import store
from .registry import reference


def sum_of_rows(gradient: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[columns] in dtype on the device, of fp32 values on the host."""
    return on_device(gradient.reshape(rows_and_columns(gradient.shape)).sum(0), dtype, device)


@reference("bgrad_quantize")
def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    """[gradient of the bias, quantised gradient]."""
    gradient = input.contiguous()
    bias = sum_of_rows(fp32(gradient), gradient.dtype, gradient.device)
    if quantizer is None:
        return [bias, gradient]
    target = empty(quantizer, gradient.shape, gradient.dtype, gradient.device)
    store(fp32(gradient), quantizer, target, source=gradient.dtype)
    return [bias, target]
