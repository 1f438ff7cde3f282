"""Activations, gated ones, and ones with a factor per row; their gradients, also beside a bias's.

Answers csrc/extensions/activation.cpp and the dbias_d* of bias.cpp; the formulas, with their constants, are
those of transformer_engine/common/util/math.h, vectorized_pointwise.h and activation/scaled_activation.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .allocate import rows_and_columns
from .bias import sum_of_rows
from .host import fp32, on_device
from .quantise import finish
from .registry import Function, NoReferenceError, reference

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """A function of fp32 values, and its derivative."""

    value: Elementwise
    slope: Elementwise


def _gelu(x: Tensor) -> Tensor:
    return x * (0.5 + 0.5 * torch.tanh(x * (0.79788456 + 0.03567741 * x * x)))


def _gelu_slope(x: Tensor) -> Tensor:
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _weighted_by_sigmoid(alpha: float) -> Activation:
    """x sigmoid(alpha x): SiLU at 1, GELU's approximation at 1.702."""
    return Activation(
        lambda x: x * torch.sigmoid(alpha * x),
        lambda x: alpha * x * _sigmoid_slope(alpha * x) + torch.sigmoid(alpha * x),
    )


GELU = Activation(_gelu, _gelu_slope)
QUICK_GELU = _weighted_by_sigmoid(1.702)
SILU = _weighted_by_sigmoid(1.0)
SIGMOID = Activation(torch.sigmoid, _sigmoid_slope)
RELU = Activation(torch.relu, lambda x: (x > 0).float())
SQUARED_RELU = Activation(lambda x: torch.relu(x).square(), lambda x: torch.relu(2 * x))
IDENTITY = Activation(lambda x: x, torch.ones_like)

PLAIN = {"gelu": GELU, "qgelu": QUICK_GELU, "relu": RELU, "srelu": SQUARED_RELU, "silu": SILU}
GATED = {
    "glu": SIGMOID,
    "geglu": GELU,
    "qgeglu": QUICK_GELU,
    "reglu": RELU,
    "sreglu": SQUARED_RELU,
    "swiglu": SILU,
}
"""Of the first half of a row; the second half is its factor."""


def clamped(limit: float, alpha: float, offset: float) -> tuple[Activation, Activation]:
    """Halves of GPT-OSS's SwiGLU: one up to limit; one within limit on both sides, plus offset."""
    inner = _weighted_by_sigmoid(alpha)
    first = Activation(
        lambda x: inner.value(x.clamp(max=limit)),
        lambda x: torch.where(x <= limit, inner.slope(x.clamp(max=limit)), 0.0),
    )
    second = Activation(
        lambda x: x.clamp(-limit, limit) + offset,
        lambda x: ((x <= limit) & (x >= -limit)).float(),
    )
    return first, second


def _gated(x: Tensor, first: Activation, second: Activation) -> Tensor:
    a, b = x.chunk(2, -1)
    return first.value(a) * second.value(b)


def _gated_gradient(grad: Tensor, x: Tensor, first: Activation, second: Activation) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([first.slope(a) * grad * second.value(b), second.slope(b) * grad * first.value(a)], -1)


def _forward(activation: Activation) -> Function:
    def forward(input: Tensor, quantizer: Any) -> Any:
        return finish(activation.value(fp32(input)), input.dtype, quantizer, input.device)

    return forward


def _backward(activation: Activation) -> Function:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        gradient = activation.slope(fp32(fwd_input)) * fp32(grad).reshape(fwd_input.shape)
        return finish(gradient, fwd_input.dtype, quantizer, grad.device)

    return backward


def _gated_forward(first: Activation) -> Function:
    def forward(input: Tensor, quantizer: Any) -> Any:
        return finish(_gated(fp32(input), first, IDENTITY), input.dtype, quantizer, input.device)

    return forward


def _gated_backward(first: Activation) -> Function:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        gradient = _gated_gradient(fp32(grad), fp32(fwd_input), first, IDENTITY)
        return finish(gradient, fwd_input.dtype, quantizer, grad.device)

    return backward


def _bias_and_backward(activation: Activation) -> Function:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> list[Any]:
        """[gradient of the bias, of the input]; with a fused kernel, the bias sums what is not rounded."""
        gradient = activation.slope(fp32(fwd_input)) * fp32(grad).reshape(fwd_input.shape)
        fused = type(quantizer).__name__ in {"Float8Quantizer", "MXFP8Quantizer"}
        summed = gradient if fused else gradient.to(grad.dtype).float()
        target = finish(gradient, grad.dtype, quantizer, grad.device)
        return [sum_of_rows(summed, grad.dtype, grad.device), target]

    return backward


for _name, _activation in PLAIN.items():
    reference(_name)(_forward(_activation))
    reference(f"d{_name}")(_backward(_activation))
    reference(f"dbias_d{_name}")(_bias_and_backward(_activation))
for _name, _activation in GATED.items():
    reference(_name)(_gated_forward(_activation))
    reference(f"d{_name}")(_gated_backward(_activation))


@reference("clamped_swiglu")
def clamped_swiglu(
    input: Tensor, quantizer: Any, limit: float = 7.0, alpha: float = 1.702, glu_linear_offset: float = 1.0
) -> Any:
    """GPT-OSS's SwiGLU."""
    values = _gated(fp32(input), *clamped(limit, alpha, glu_linear_offset))
    return finish(values, input.dtype, quantizer, input.device)


@reference("clamped_dswiglu")
def clamped_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
) -> Any:
    """Gradient of clamped_swiglu."""
    gradient = _gated_gradient(fp32(grad), fp32(fwd_input), *clamped(limit, alpha, glu_linear_offset))
    return finish(gradient, fwd_input.dtype, quantizer, grad.device)


def _scaled(input: Tensor, factors: Tensor, first: Activation, second: Activation, quantizer: Any) -> Any:
    x = fp32(input).reshape(rows_and_columns(input.shape))
    values = _gated(x, first, second) * fp32(factors).reshape(-1, 1)
    # The kernel writes the type of its input, and quantising reads that.
    return finish(values.reshape(*input.shape[:-1], -1), input.dtype, quantizer, input.device, fused=False)


def _scaled_gradient(
    grad: Tensor,
    input: Tensor,
    factors: Tensor,
    halves: tuple[Activation, Activation],
    quantizer: Any,
    compute_scale_grad: bool,
) -> tuple[Any, Tensor | None]:
    x = fp32(input).reshape(rows_and_columns(input.shape))
    upstream = fp32(grad).reshape(x.shape[0], -1)
    gradient = _gated_gradient(upstream * fp32(factors).reshape(-1, 1), x, *halves).reshape(input.shape)
    of_input = finish(gradient, input.dtype, quantizer, input.device, fused=False)
    if not compute_scale_grad:
        return of_input, None
    of_factors = (upstream * _gated(x, *halves)).sum(1)
    return of_input, on_device(of_factors, factors.dtype, factors.device, factors.shape)


def _refuse_interleaved(name: str, size: int) -> None:
    if size:
        raise NoReferenceError(
            f"The emulated device has no reference for {name} with glu_interleave_size={size}"
        )


@reference("scaled_swiglu")
def scaled_swiglu(input: Tensor, act_scales: Tensor, quantizer: Any, glu_interleave_size: int = 0) -> Any:
    """SwiGLU with a factor per row: an expert's output with the router's probability."""
    _refuse_interleaved("scaled_swiglu", glu_interleave_size)
    return _scaled(input, act_scales, SILU, IDENTITY, quantizer)


@reference("scaled_dswiglu")
def scaled_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    glu_interleave_size: int = 0,
    compute_scale_grad: bool = True,
) -> tuple[Any, Tensor | None]:
    """(gradient of the input, of the factors)."""
    _refuse_interleaved("scaled_dswiglu", glu_interleave_size)
    return _scaled_gradient(grad, fwd_input, act_scales, (SILU, IDENTITY), quantizer, compute_scale_grad)


@reference("scaled_clamped_swiglu")
def scaled_clamped_swiglu(
    input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
    glu_interleave_size: int = 0,
) -> Any:
    """clamped_swiglu with a factor per row."""
    _refuse_interleaved("scaled_clamped_swiglu", glu_interleave_size)
    return _scaled(input, act_scales, *clamped(limit, alpha, glu_linear_offset), quantizer)


@reference("scaled_clamped_dswiglu")
def scaled_clamped_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    act_scales: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.702,
    glu_linear_offset: float = 1.0,
    glu_interleave_size: int = 0,
    compute_scale_grad: bool = True,
) -> tuple[Any, Tensor | None]:
    """(gradient of the input, of the factors)."""
    _refuse_interleaved("scaled_clamped_dswiglu", glu_interleave_size)
    halves = clamped(limit, alpha, glu_linear_offset)
    return _scaled_gradient(grad, fwd_input, act_scales, halves, quantizer, compute_scale_grad)
