"""Kernels over lists of tensors: Adam and its variants, SGD, scaling, norms.

Answers csrc/extensions/multi_tensor/*.cpp and transformer_engine/common/multi_tensor. Everything is computed in fp32
and rounded to the type of each tensor where it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .float8 import encode, magnitude
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
    g, p = gradient.float(), parameter.float()
    if mode == 0:
        g = g + weight_decay * p
    m = betas[0] * first.float() + (1 - betas[0]) * g
    v = betas[1] * second.float() + (1 - betas[1]) * g * g
    update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + epsilon)
    if mode == 1:
        update = update + weight_decay * p
    # The parameter moves by the moments before they are rounded to their own type.
    first.copy_(m)
    second.copy_(v)
    return p - lr * update


def _corrections(step: int | Tensor, betas: tuple[float, float], bias_correction: int) -> tuple[Any, Any]:
    return (1 - betas[0] ** step, 1 - betas[1] ** step) if bias_correction == 1 else (1.0, 1.0)


@reference("multi_tensor_adam")
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Lists of gradient, parameter, moments and maybe the fp32 parameter; the flag plays no part."""
    settings = _settings(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for gradient, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        source = master[0] if master else parameter
        new = _adam((gradient, source, first, second), **settings)
        for target in (parameter, *master):
            target.copy_(new)


def _fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _settings(
    lr: Any, beta1: float, beta2: float, epsilon: float, step: Any, mode: int, bias_correction: int, decay: float
) -> dict[str, Any]:
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
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Lists of gradient, bf16 parameter, moments and the lower 16 bits (int16) of the fp32 parameter.

    The bf16 parameter is the upper half of the bits, one up where the lower half is negative: rounded half up.
    """
    settings = _settings(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for gradient, parameter, first, second, remainder in zip(*tensor_lists, strict=True):
        upper = parameter.view(torch.int16).int() - (remainder < 0).int()
        bits = (upper << 16) | (remainder.int() & 0xFFFF)
        new = _adam((gradient, bits.view(torch.float32), first, second), **settings).view(torch.int32)
        lower = (new & 0xFFFF).to(torch.int16)
        parameter.view(torch.int16).copy_((new >> 16) + (lower < 0).int())
        remainder.copy_(lower)


@reference("multi_tensor_adam_fp8")
def multi_tensor_adam_fp8(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    fp8_dtype: Any,
) -> None:
    """Lists of gradient, FP8 bytes, moments, fp32 parameter, and the bytes' scale, amax and inverse scale."""
    settings = _settings(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for gradient, codes, first, second, master, scale, amax, scale_inv in zip(*tensor_lists, strict=True):
        new = _adam((gradient, master, first, second), **settings)
        master.copy_(new)
        codes.copy_(encode(new * scale, fp8_dtype).view(codes.dtype).reshape(codes.shape))
        amax.copy_(torch.maximum(amax, magnitude(new)))
        scale_inv.copy_(scale.reciprocal())


def _capturable(tensor_lists: Lists, noop_flag: Tensor, inv_scale: Tensor, settings: dict[str, Any]) -> None:
    if noop_flag.item() == 1:
        return
    for gradient, parameter, first, second, *master in zip(*tensor_lists, strict=True):
        unscaled = gradient.float() * inv_scale
        gradient.copy_(unscaled)
        source = master[0] if master else parameter
        new = _adam((unscaled, source, first, second), **settings)
        for target in (parameter, *master):
            target.copy_(new)


@reference("multi_tensor_adam_capturable")
def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """multi_tensor_adam with tensors for what changes, which unscales the gradients and heeds the flag."""
    settings = _settings(lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    _capturable(tensor_lists, noop_flag, inv_scale, settings)


reference("multi_tensor_adam_capturable_master")(multi_tensor_adam_capturable)


@reference("multi_tensor_sgd")
def multi_tensor_sgd(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    wd: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
    scale: float,
) -> None:
    """Lists of gradient, parameter, momentum and maybe a copy of the parameter in another type."""
    if noop_flag.item():
        return
    for gradient, parameter, moving, *model in zip(*tensor_lists, strict=True):
        g, p = gradient.float() * scale, parameter.float()
        if not wd_after_momentum:
            g = g + wd * p
        if momentum:
            moved = g if first_run else moving.float() * momentum + (1 - dampening) * g
            moving.copy_(moved)
            g = g + momentum * moved if nesterov else moved
        if wd_after_momentum:
            g = g + wd * p
        for target in (parameter, *model):
            target.copy_(p - lr * g)


def _scale(is_infinite: Tensor, tensor_lists: Lists, scale: float | Tensor) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        if not source.isfinite().all():
            is_infinite.fill_(1)
        target.copy_(source.float() * scale)


@reference("multi_tensor_scale")
def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Second list = first list x scale; the flag becomes 1 at a value that is not finite."""
    _scale(is_infinite, tensor_lists, scale)


@reference("multi_tensor_scale_tensor")
def multi_tensor_scale_tensor(chunk_size: int, is_infinite: Tensor, tensor_lists: Lists, scale: Tensor) -> None:
    """multi_tensor_scale with the factor on the device."""
    _scale(is_infinite, tensor_lists, scale.float())


def _norms(
    noop_flag: Tensor, tensor_lists: Lists, factor: Tensor | float, per_tensor: bool | None
) -> tuple[Tensor, Tensor]:
    squares = torch.stack([(tensor.float() * factor).square().sum() for tensor in tensor_lists[0]])
    if not squares.isfinite().all():
        noop_flag.fill_(1)
    return squares.sum().sqrt().reshape(1), squares.sqrt() if per_tensor else squares.new_empty(0)


@reference("multi_tensor_l2norm")
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor_python: bool | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of all [1], norm of each [tensors] if asked for, else [0])."""
    return _norms(noop_flag, tensor_lists, 1.0, per_tensor_python)


@reference("multi_tensor_unscale_l2norm")
def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    inv_scale: Tensor,
    per_tensor_python: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """multi_tensor_l2norm of the tensors x inv_scale, which stay as they are."""
    return _norms(noop_flag, tensor_lists, inv_scale.float(), per_tensor_python)
