"""How a reference reads and writes the device's memory without allocating any of it.

What a reference computes on the way lies on the host. The device's account then has what the kernel's own
binding allocates, no more, and the operators run without a detour through the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..aten import on_device as copied_to_device
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


def on_the_host[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function is called with the host's view of tensors; new ones that it returns go to the device."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        devices: list[torch.device] = []

        def to_host(value: object) -> object:
            if type(value) not in (Tensor, torch.nn.Parameter):
                return value
            assert isinstance(value, Tensor)
            if value.is_cuda:
                devices.append(value.device)
            return host(value)

        def to_device(value: object) -> object:
            if isinstance(value, Tensor) and devices and not value.is_cuda:
                return copied_to_device(value, devices[0])
            return value

        there, more = tree_map(to_host, (arguments, named))
        result: R = tree_map(to_device, function(*there, **more))
        return result

    return call
