"""RMSNorm and LayerNorm.

Answers csrc/extensions/normalization.cpp and transformer_engine/common/normalization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .allocate import rows_and_columns
from .float8 import torch_type
from .host import fp32, host, on_device
from .quantise import finish
from .registry import reference


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return fp32(weight) + 1 if zero_centered else fp32(weight)


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
    x = fp32(input).reshape(rows_and_columns(input.shape))
    rsigma = (x.square().mean(1) + eps).rsqrt()
    y = x * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    output = finish(y.reshape(input.shape), torch_type(otype), quantizer, input.device, ln_out)
    return [output, None, on_device(rsigma, torch.float32, input.device)]


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
    x = fp32(input).reshape(rows_and_columns(input.shape))
    mu = x.mean(1)
    centred = x - mu[:, None]
    rsigma = (centred.square().mean(1) + eps).rsqrt()
    y = centred * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    y = y if bias is None else y + fp32(bias)
    output = finish(y.reshape(input.shape), torch_type(otype), quantizer, input.device, ln_out)
    return [output, *(on_device(each, torch.float32, input.device) for each in (mu, rsigma))]


@reference("rmsnorm_bwd")
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[gradient of x, gradient of the weight], in the types of both."""
    shape = rows_and_columns(x.shape)
    factor = host(rsigma)[:, None]
    y = fp32(x).reshape(shape) * factor
    upstream = fp32(dz).reshape(shape)
    dy = upstream * _gamma(gamma, zero_centered_gamma)
    dx = factor * (dy - y * (dy * y).mean(1, keepdim=True))
    of_weight = on_device((upstream * y).sum(0), gamma.dtype, gamma.device)
    return [on_device(dx, x.dtype, x.device, x.shape), of_weight]


@reference("layernorm_bwd")
def layernorm_bwd(
    dz: Tensor,
    x: Tensor,
    mu: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """[gradients of x, of the weight, of the bias]."""
    shape = rows_and_columns(x.shape)
    factor = host(rsigma)[:, None]
    y = (fp32(x).reshape(shape) - host(mu)[:, None]) * factor
    upstream = fp32(dz).reshape(shape)
    dy = upstream * _gamma(gamma, zero_centered_gamma)
    dx = factor * (dy - dy.mean(1, keepdim=True) - y * (dy * y).mean(1, keepdim=True))
    weight, bias = (upstream * y).sum(0), upstream.sum(0)
    of_parameters = [on_device(each, gamma.dtype, gamma.device) for each in (weight, bias)]
    return [on_device(dx, x.dtype, x.device, x.shape), *of_parameters]
