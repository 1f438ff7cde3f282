"""Codes of 8 bits and their scales, as the kernels compute them.

Answers transformer_engine/common/recipe/recipe_common.cuh (a scale from the largest magnitude), the casts of
cuda_fp8.h that every kernel uses (to the nearest even, saturating) and util/ptx.cuh (E8M0 scales).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TORCH_TYPES: dict[int, torch.dtype] = {
    0: torch.uint8,
    2: torch.int32,
    3: torch.int64,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}
"""transformer_engine::DType of transformer_engine.h, by value -> PyTorch's."""

LARGEST_FP32 = torch.finfo(torch.float32).max


def torch_type(dtype: Any) -> torch.dtype:
    """PyTorch's type of a DType, whether it is the binding's or transformer_engine.pytorch's own."""
    return TORCH_TYPES[int(dtype)]


def largest(dtype: Any) -> float:
    """The largest finite value of an FP8 type: 448 (E4M3) or 57344 (E5M2)."""
    return torch.finfo(torch_type(dtype)).max


def encode(values: Tensor, dtype: Any) -> Tensor:
    """Bytes of the values in an FP8 type: to the nearest even, saturating, also from an infinity.

    PyTorch's cast makes a NaN or an infinity of what is too large; CUDA's, with __NV_SATFINITE, does not.
    """
    limit = largest(dtype)
    return values.float().clamp(-limit, limit).to(torch_type(dtype)).view(torch.uint8)


def decode(codes: Tensor, dtype: Any) -> Tensor:
    """fp32 values of FP8 bytes."""
    return codes.view(torch_type(dtype)).float()


def magnitude(values: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Largest absolute value, in fp32; as CUDA's fmaxf, it passes over NaN."""
    positive = values.float().abs().nan_to_num(nan=0.0, posinf=float("inf"))
    return positive.amax() if dim is None else positive.amax(dim)


def scale_from_amax(
    amax: Tensor,
    limit: float,
    *,
    power_of_two: bool = False,
    epsilon: float = 0.0,
    instead_of_infinity: float = LARGEST_FP32,
) -> Tensor:
    """compute_scale_from_amax of recipe_common.cuh: limit / amax; 1 where amax is 0, infinite or NaN.

    With power_of_two, the mantissa is cut off: the scale is rounded down.
    """
    amax = torch.where(amax < epsilon, epsilon, amax).float()
    # `limit / amax` would be the reciprocal times limit, which rounds twice.
    scale = torch.full_like(amax, limit) / amax
    scale = torch.where(scale.isinf(), instead_of_infinity, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)
    return torch.where(amax.isinf() | amax.isnan() | (amax == 0), 1.0, scale)


def e8m0(values: Tensor) -> Tensor:
    """Exponent byte of the least power of two that is not below a positive fp32 value (float_to_e8m0).

    2**(byte - 127); 255 is NaN, an infinity gives 254, 0 gives 0.
    """
    bits = values.float().contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # Below the least normal number, 2**-127 is one half of it: only what lies above goes one up.
    up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    byte = exponent + up.int()
    byte = torch.where(values.isinf(), 254, byte)
    return torch.where(values.isnan(), 255, byte).to(torch.uint8)


def e8m0_value(byte: Tensor) -> Tensor:
    """2**(byte - 127) in fp32; NaN of 255 (exp2f of ptx.cuh)."""
    # By its bits: 2**-127 is one half of the least normal number, which ldexp and exp2 may flush to 0.
    bits = torch.where(byte == 0, 0x00400000, byte.int() << 23)
    return torch.where(byte == 255, 0x7FFFFFFF, bits).view(torch.float32)


def e8m0_reciprocal(byte: Tensor) -> Tensor:
    """2**(127 - byte) in fp32; NaN of 255 (exp2f_rcp of ptx.cuh)."""
    bits = torch.where(byte == 254, 0x00400000, (254 - byte.int()) << 23)
    return torch.where(byte == 255, 0x7FFFFFFF, bits).view(torch.float32)
