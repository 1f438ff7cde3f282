"""RMSNorm and LayerNorm against PyTorch's in float64, and autograd."""

from __future__ import annotations

import pytest
import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from transformer_engine.pytorch import DType, Float8CurrentScalingQuantizer, Float8Quantizer

from tests.emulated_cuda.tests import formats
from tests.emulated_cuda.tests.formats import relative

SHAPE = (3, 5, 96)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).cuda()


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_a_norm_and_its_gradients_are_those_of_float64(name: str, zero_centred: bool) -> None:
    module = getattr(te, name)(SHAPE[-1], eps=1e-5, zero_centered_gamma=zero_centred, device="cuda")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(SHAPE[-1]))
    x, upstream = random(*SHAPE).requires_grad_(), random(*SHAPE) * 2
    module(x).backward(upstream)
    plain = x.detach().cpu().double().requires_grad_()
    weight = module.weight.detach().cpu().double().requires_grad_()
    scaled = weight + 1 if zero_centred else weight
    if name == "RMSNorm":
        expected = torch.nn.functional.rms_norm(plain, SHAPE[-1:], scaled, 1e-5)
    else:
        bias = module.bias.detach().cpu().double().requires_grad_()
        expected = torch.nn.functional.layer_norm(plain, SHAPE[-1:], scaled, bias, 1e-5)
    expected.backward(upstream.cpu().double())
    assert relative(module(x), expected) < 1e-6
    assert x.grad is not None and plain.grad is not None and weight.grad is not None
    assert relative(x.grad, plain.grad) < 1e-6
    assert relative(module.weight.grad, weight.grad) < 1e-6
    if name == "LayerNorm":
        assert bias.grad is not None
        assert relative(module.bias.grad, bias.grad) < 1e-6


def test_delayed_scaling_quantises_the_unrounded_norm_and_tensorwise_the_rounded_one() -> None:
    x, weight = random(32, 64).bfloat16(), random(64).bfloat16()
    fp32 = torch.nn.functional.rms_norm(x.cpu().double(), (64,), weight.cpu().double(), 1e-5)
    scale, amax = torch.tensor([8.0], device="cuda"), torch.zeros(1, device="cuda")
    delayed = Float8Quantizer(scale, amax, DType.kFloat8E4M3)
    found, _, _ = tex.rmsnorm_fwd(x, weight, 1e-5, None, delayed, DType.kBFloat16, 0, False)
    expected = formats.decoded(formats.codes(fp32.numpy() * 8, "E4M3"), "E4M3") / 8
    assert abs(amax.item() / fp32.abs().max().item() - 1) < 1e-6, "not a bf16 number"
    assert relative(found.dequantize(dtype=torch.float32), expected) < 2e-3, (
        "fp32 rounds a few to the other side"
    )
    tensorwise = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device="cuda")
    found, _, _ = tex.rmsnorm_fwd(x, weight, 1e-5, None, tensorwise, DType.kBFloat16, 0, False)
    plain, _, _ = tex.rmsnorm_fwd(x, weight, 1e-5, None, None, DType.kBFloat16, 0, False)
    assert torch.equal(found._data, tensorwise(plain)._data)
