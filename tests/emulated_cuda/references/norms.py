"""RMSNorm.

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
