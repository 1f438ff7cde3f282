"""RMSNorm and LayerNorm. Answers csrc/extensions/normalization.cpp and transformer_engine/common/normalization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .allocate import rows_and_columns
from .float8 import torch_type
from .quantise import finish
from .registry import reference


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


@reference("rmsnorm_fwd")
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[output, None, 1 / root mean square of each row in fp32]."""
    x = input.reshape(rows_and_columns(input.shape)).float()
    rsigma = (x.square().mean(1) + eps).rsqrt()
    y = x * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    return [finish(y.reshape(input.shape), torch_type(otype), quantizer, ln_out), None, rsigma]


@reference("layernorm_fwd")
def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[output, mean and 1 / deviation of each row in fp32]."""
    x = input.reshape(rows_and_columns(input.shape)).float()
    mu = x.mean(1)
    centred = x - mu[:, None]
    rsigma = (centred.square().mean(1) + eps).rsqrt()
    y = centred * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    y = y if bias is None else y + bias.float()
    return [finish(y.reshape(input.shape), torch_type(otype), quantizer, ln_out), mu, rsigma]


def _rmsnorm_gradients(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    shape = rows_and_columns(x.shape)
    y = x.reshape(shape).float() * rsigma[:, None]
    dz = dz.reshape(shape).float()
    dy = dz * _gamma(gamma, zero_centered)
    dx = rsigma[:, None] * (dy - y * (dy * y).mean(1, keepdim=True))
    return dx.reshape(x.shape), (dz * y).sum(0).to(gamma.dtype)


@reference("rmsnorm_bwd")
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[gradient of x, gradient of the weight], in the types of both."""
    dx, dgamma = _rmsnorm_gradients(dz, x, rsigma, gamma, zero_centered_gamma)
    return [dx.to(x.dtype), dgamma]


@reference("rmsnorm_bwd_add")
def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """rmsnorm_bwd, with add [shape of x] on the gradient of x before it is rounded."""
    dx, dgamma = _rmsnorm_gradients(dz, x, rsigma, gamma, zero_centered_gamma)
    return [(dx + add.reshape(x.shape).float()).to(x.dtype), dgamma]


@reference("layernorm_bwd")
def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[gradients of x, of the weight, of the bias]."""
    shape = rows_and_columns(x.shape)
    y = (x.reshape(shape).float() - mu[:, None]) * rsigma[:, None]
    upstream = dz.reshape(shape).float()
    dy = upstream * _gamma(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (dy - dy.mean(1, keepdim=True) - y * (dy * y).mean(1, keepdim=True))
    weight, bias = (upstream * y).sum(0), upstream.sum(0)
    return [dx.reshape(x.shape).to(x.dtype), weight.to(gamma.dtype), bias.to(gamma.dtype)]
