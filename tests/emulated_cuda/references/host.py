"""How a reference reads and writes the device's memory without allocating any of it.

What a reference computes on the way lies on the host. The device's account then has what the kernel's own
binding allocates, no more, and the operators run without a detour through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..aten import on_host


def host(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU without a gradient, to read and to write in place."""
    return on_host(tensor) if tensor.is_cuda else tensor.detach()


def fp32(tensor: Tensor) -> Tensor:
    """The values in fp32, to read."""
    return host(tensor).float()


def on_device(
    values: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int] | None = None
) -> Tensor:
    """A new tensor of the device with these values of the host."""
    result = torch.empty(values.shape if shape is None else list(shape), dtype=dtype, device=device)
    host(result).copy_(values.reshape(result.shape))
    return result
