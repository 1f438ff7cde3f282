"""Transformer Engine's layers: in bf16 against float64, with FP8 against a float64 model of each recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformer_engine.pytorch as te
from torch.nn import functional
from transformer_engine.common.recipe import DelayedScaling

from tests.emulated_cuda.tests.formats import matrix, relative
from tests.emulated_cuda.tests.rounding import BF16, RECIPES, Rounding, whole

TOKENS, INNER, OUTER = 64, 256, 384


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def passed(
    layer: Any, x: torch.Tensor, upstream: torch.Tensor, recipe: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gradient of the input) of one pass; parameters have theirs."""
    x = x.detach().requires_grad_()
    with te.autocast(enabled=recipe is not None, recipe=recipe):
        output = layer(x, **options)
    output.backward(upstream)
    assert x.grad is not None
    return output.detach(), x.grad


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_layer_is_the_products_of_its_recipe(name: str) -> None:
    kind, rounding = RECIPES[name]
    layer = te.Linear(INNER, OUTER, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer.bias.copy_(random(OUTER, seed=3))
    x, upstream = random(TOKENS, INNER), random(TOKENS, OUTER, seed=1)
    # [sequence, batch, hidden], as in megatron-core
    output, of_x = passed(layer, x.reshape(16, 4, INNER), upstream.reshape(16, 4, OUTER), kind and kind())
    expected = rounding.products(matrix(x), matrix(layer.weight), matrix(upstream))
    assert relative(output.flatten(0, 1), expected[0] + matrix(layer.bias)) < BF16
    assert relative(of_x.flatten(0, 1), expected[1]) < BF16
    assert relative(layer.weight.grad, expected[2]) < BF16
    assert relative(layer.bias.grad, matrix(upstream).sum(0)) < BF16


@pytest.mark.parametrize("name", RECIPES)
def test_a_norm_before_a_linear_layer_is_rounded_as_its_input(name: str) -> None:
    kind, rounding = RECIPES[name]
    layer = te.LayerNormLinear(
        INNER, OUTER, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cuda"
    )
    with torch.no_grad():
        layer.layer_norm_weight.copy_(1 + 0.1 * random(INNER, seed=2))
    x, upstream = random(TOKENS, INNER), random(TOKENS, OUTER, seed=1)
    output, of_x = passed(layer, x, upstream, kind and kind())
    plain, weight = x.cpu().double().requires_grad_(), layer.layer_norm_weight.detach().cpu().double()
    weight.requires_grad_()
    normed = functional.rms_norm(plain, (INNER,), weight, 1e-5)
    # with delayed scaling the kernel quantises its fp32 values, and else what it has rounded to bf16
    kept = normed.detach() if name == "delayed" else normed.detach().bfloat16().double()
    y, of_normed, of_weight = rounding.products(kept.numpy(), matrix(layer.weight), matrix(upstream))
    normed.backward(torch.from_numpy(of_normed))
    assert plain.grad is not None and weight.grad is not None
    assert relative(output, y) < BF16
    assert relative(of_x, plain.grad) < BF16
    assert relative(layer.weight.grad, of_weight) < BF16
    assert relative(layer.layer_norm_weight.grad, weight.grad) < BF16


@pytest.mark.parametrize("name", RECIPES)
def test_experts_are_linear_layers_each_with_its_own_rounding(name: str) -> None:
    kind, rounding = RECIPES[name]
    splits = [16, 0, 48]
    layer = te.GroupedLinear(3, INNER, OUTER, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x, upstream = random(TOKENS, INNER), random(TOKENS, OUTER, seed=1)
    output, of_x = passed(layer, x, upstream, kind and kind(), m_splits=splits)
    start = 0
    for i, tokens in enumerate(splits):
        part = slice(start, start + tokens)
        start += tokens
        weight = getattr(layer, f"weight{i}")
        if not tokens:
            assert not weight.grad.any()
            continue
        expected = rounding.products(matrix(x[part]), matrix(weight), matrix(upstream[part]))
        for found, wanted in zip((output[part], of_x[part], weight.grad), expected, strict=True):
            assert relative(found, wanted) < BF16


def test_delayed_scaling_takes_its_scales_from_the_passes_before() -> None:
    layer = te.Linear(INNER, OUTER, bias=False, params_dtype=torch.bfloat16, device="cuda")
    seen: list[Sequence[float]] = []
    for step in range(3):
        x, upstream = 8 / (step + 1) * random(TOKENS, INNER, seed=step), random(TOKENS, OUTER, seed=step) / 16
        output, of_x = passed(layer, x, upstream, DelayedScaling())
        scales = np.max(seen, axis=0) if seen else None
        scale_x, scale_w, scale_g = (
            np.array([448, 448, 57344], np.float32) / np.array(scales, np.float32)
            if scales is not None
            else np.ones(3)
        )
        rounding = Rounding(
            (whole("E4M3", scale_x),) * 2, whole("E4M3", scale_w), (whole("E5M2", scale_g),) * 2
        )
        expected = rounding.products(matrix(x), matrix(layer.weight), matrix(upstream))
        assert relative(output, expected[0]) < BF16
        assert relative(of_x, expected[1]) < BF16
        seen.append([tensor.abs().max().item() for tensor in (x, layer.weight, upstream)])


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_weights_are_added_to_main_grad_in_fp32(name: str) -> None:
    kind, rounding = RECIPES[name]
    layer = te.Linear(
        INNER, OUTER, bias=False, params_dtype=torch.bfloat16, device="cuda", fuse_wgrad_accumulation=True
    )
    layer.weight.main_grad = torch.ones(OUTER, INNER, device="cuda")
    x, upstream = random(TOKENS, INNER), random(TOKENS, OUTER, seed=1)
    passed(layer, x, upstream, kind and kind())
    *_, of_weight = rounding.products(matrix(x), matrix(layer.weight), matrix(upstream))
    assert relative(layer.weight.main_grad, of_weight + 1) < 1e-5


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise"])
def test_a_parameter_in_fp8_is_used_as_it_is(name: str) -> None:
    kind, rounding = RECIPES[name]
    with te.quantized_model_init(enabled=True, recipe=kind()):
        layer = te.Linear(INNER, OUTER, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weight = matrix(layer.weight.dequantize(dtype=torch.float32))
    x, upstream = random(TOKENS, INNER), random(TOKENS, OUTER, seed=1)
    output, of_x = passed(layer, x, upstream, kind())
    expected = Rounding(rounding.x, lambda values: values, rounding.gradient).products(
        matrix(x), weight, matrix(upstream)
    )
    assert relative(output, expected[0]) < BF16
    assert relative(of_x, expected[1]) < BF16
    assert relative(layer.weight.grad, expected[2]) < BF16
