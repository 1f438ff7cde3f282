"""Activations and their gradients against PyTorch's in float64, and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformer_engine.pytorch  # noqa: F401  (it loads the next)
import transformer_engine_torch as tex
from torch.nn import functional
from transformer_engine.pytorch import DType, Float8CurrentScalingQuantizer, Float8Quantizer

from tests.emulated_cuda.references.registry import NoReferenceError
from tests.emulated_cuda.tests.formats import relative

Plain = Callable[[torch.Tensor], torch.Tensor]


def gated(activation: Plain) -> Plain:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return activation(first) * second

    return gate


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


PLAIN: dict[str, Plain] = {
    "gelu": gelu, "qgelu": quick_gelu, "relu": functional.relu, "srelu": squared_relu,
    "silu": functional.silu,
    "glu": gated(torch.sigmoid), "geglu": gated(gelu), "qgeglu": gated(quick_gelu),
    "reglu": gated(functional.relu), "sreglu": gated(squared_relu), "swiglu": gated(functional.silu),
}  # fmt: skip
WITH_BIAS = ("gelu", "qgelu", "relu", "srelu", "silu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).cuda()


def gradient(plain: Plain, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    inner = x.cpu().double().requires_grad_()
    plain(inner).backward(upstream.cpu().double())
    assert inner.grad is not None
    return inner.grad


@pytest.mark.parametrize("name", PLAIN)
def test_an_activation_and_its_gradient_are_those_of_float64(name: str) -> None:
    x = random(5, 7, 32)
    found = getattr(tex, name)(x, None)
    assert relative(found, PLAIN[name](x.cpu().double())) < 1e-6
    upstream = random(*found.shape, seed=1)
    expected = gradient(PLAIN[name], x, upstream)
    assert relative(getattr(tex, f"d{name}")(upstream, x, None), expected) < 1e-6
    if name in WITH_BIAS:
        quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E5M2, device="cuda")
        of_bias, quantised = getattr(tex, f"dbias_d{name}")(upstream, x, quantizer)
        assert relative(of_bias, expected.flatten(0, 1).sum(0)) < 1e-6
        assert relative(quantised.dequantize(), expected) < 0.1


def clamped(x: torch.Tensor) -> torch.Tensor:
    """As modeling_gpt_oss.py of transformers has it, with the halves one behind the other."""
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=2.0), up.clamp(min=-2.0, max=2.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def test_the_clamped_swiglu_is_that_of_gpt_oss() -> None:
    x, upstream = random(5, 32), random(5, 16, seed=1)
    assert relative(tex.clamped_swiglu(x, None, limit=2.0), clamped(x.cpu().double())) < 1e-6
    expected = gradient(clamped, x, upstream)
    assert relative(tex.clamped_dswiglu(upstream, x, None, limit=2.0), expected) < 1e-6


@pytest.mark.parametrize("name", ["swiglu", "clamped_swiglu"])
def test_a_factor_per_row_scales_the_result_and_gets_a_gradient(name: str) -> None:
    plain = PLAIN.get(name, clamped)
    limit = {} if name == "swiglu" else {"limit": 2.0}
    x, factors, upstream = random(5, 32), random(5, seed=2), random(5, 16, seed=1)
    inner, weights = x.cpu().double().requires_grad_(), factors.cpu().double().requires_grad_()
    expected = plain(inner) * weights[:, None]
    expected.backward(upstream.cpu().double())
    assert relative(getattr(tex, f"scaled_{name}")(x, factors, None, **limit), expected) < 1e-6
    backward = getattr(tex, "scaled_dswiglu" if name == "swiglu" else "scaled_clamped_dswiglu")
    of_x, of_factors = backward(upstream, x, factors, None, **limit)
    assert inner.grad is not None and weights.grad is not None
    assert relative(of_x, inner.grad) < 1e-6
    assert relative(of_factors, weights.grad) < 1e-6
    with pytest.raises(NoReferenceError, match="glu_interleave_size=32"):
        getattr(tex, f"scaled_{name}")(x, factors, None, glu_interleave_size=32, **limit)


def test_only_delayed_scaling_quantises_what_is_not_rounded() -> None:
    x = random(32, 64).bfloat16()
    rounded = tex.swiglu(x, None)
    tensorwise = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device="cuda")
    assert torch.equal(tex.swiglu(x, tensorwise)._data, tensorwise(rounded)._data)
    amax = torch.zeros(1, device="cuda")
    tex.swiglu(x, Float8Quantizer(torch.ones(1, device="cuda"), amax, DType.kFloat8E4M3))
    exact = PLAIN["swiglu"](x.cpu().double()).abs().max().item()
    assert abs(amax.item() / exact - 1) < 1e-6
