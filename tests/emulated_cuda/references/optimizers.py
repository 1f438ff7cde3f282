"""Kernels over lists of tensors: Adam, scaling, norms.

Answers csrc/extensions/multi_tensor/*.cpp and transformer_engine/common/multi_tensor. Everything is computed
in fp32 and rounded to the type of each tensor where it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .host import fp32, host, on_device
from .registry import reference

Lists = Sequence[Sequence[Tensor]]


def _adam(
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    epsilon: float,
    corrections: tuple[float | Tensor, float | Tensor],
    mode: int,
    weight_decay: float,
) -> Tensor:
    """fp32 parameter after a step of (gradient, parameter, both moments); the moments are updated in place.

    Mode 0 adds the decay to the gradient (L2), mode 1 to the update (AdamW).
    """
    gradient, parameter, first, second = lists
    g, p = fp32(gradient), fp32(parameter)
    if mode == 0:
        g = g + weight_decay * p
    m = betas[0] * fp32(first) + (1 - betas[0]) * g
    v = betas[1] * fp32(second) + (1 - betas[1]) * g * g
    update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + epsilon)
    if mode == 1:
        update = update + weight_decay * p
    # The parameter moves by the moments before they are rounded to their own type.
    host(first).copy_(m)
    host(second).copy_(v)
    return p - lr * update


def _corrections(step: int | Tensor, betas: tuple[float, float], bias_correction: int) -> tuple[Any, Any]:
    return (1 - betas[0] ** step, 1 - betas[1] ** step) if bias_correction == 1 else (1.0, 1.0)


@reference("multi_tensor_adam")
def multi_tensor_adam(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *numbers: Any) -> None:
    """Lists of gradient, parameter, moments and maybe the fp32 parameter; the flag plays no part.

    numbers: the arguments of _settings, in their order.
    """
    settings = _settings(*numbers)
    for gradient, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        source = master[0] if master else parameter
        new = _adam((gradient, source, first, second), **settings)
        for target in (parameter, *master):
            host(target).copy_(new)


def _fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _settings(
    lr: Any,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Any,
    mode: int,
    bias_correction: int,
    decay: float,
) -> dict[str, Any]:
    """What a step of Adam goes by, of the numbers that follow the lists in each of its kernels."""
    # Arguments of the kernel are fp32: 1 - 0.999 is then 0.00099998713.
    betas = (_fp32(beta1), _fp32(beta2))
    return {
        "lr": lr,
        "betas": betas,
        "epsilon": epsilon,
        "corrections": _corrections(step, betas, bias_correction),
        "mode": mode,
        "weight_decay": decay,
    }


@reference("multi_tensor_adam_param_remainder")
def multi_tensor_adam_param_remainder(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, *numbers: Any
) -> None:
    """Lists of gradient, bf16 parameter, moments and the lower 16 bits (int16) of the fp32 parameter.

    The bf16 parameter is the upper half of the bits, one up where the lower half is negative: rounded half
    up.
    """
    settings = _settings(*numbers)
    for gradient, parameter, first, second, remainder in zip(*tensor_lists, strict=True):
        halves, remainder = host(parameter).view(torch.int16), host(remainder)
        upper = halves.int() - (remainder < 0).int()
        bits = (upper << 16) | (remainder.int() & 0xFFFF)
        new = _adam((gradient, bits.view(torch.float32), first, second), **settings).view(torch.int32)
        lower = (new & 0xFFFF).to(torch.int16)
        halves.copy_((new >> 16) + (lower < 0).int())
        remainder.copy_(lower)


def _scale(is_infinite: Tensor, tensor_lists: Lists, scale: float | Tensor) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        values = fp32(source)
        if not values.isfinite().all():
            host(is_infinite).fill_(1)
        host(target).copy_(values * scale)


@reference("multi_tensor_scale")
def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Second list = first list x scale; the flag becomes 1 at a value that is not finite."""
    _scale(is_infinite, tensor_lists, scale)


@reference("multi_tensor_scale_tensor")
def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: Lists, scale: Tensor
) -> None:
    """multi_tensor_scale with the factor on the device."""
    _scale(is_infinite, tensor_lists, fp32(scale))


@reference("multi_tensor_l2norm")
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor_python: bool | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of all [1], norm of each [tensors] if asked for, else [0])."""
    squares = torch.stack([fp32(tensor).square().sum() for tensor in tensor_lists[0]])
    if not squares.isfinite().all():
        host(noop_flag).fill_(1)
    whole, each = squares.sum().sqrt().reshape(1), squares.sqrt() if per_tensor_python else squares[:0]
    device = tensor_lists[0][0].device
    return on_device(whole, torch.float32, device), on_device(each, torch.float32, device)
