"""Bytes and scales of each recipe against the definition of its format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.pytorch import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    MXFP8Quantizer,
)
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

from tests.emulated_cuda.references.float8 import e8m0, e8m0_reciprocal, e8m0_value, encode
from tests.emulated_cuda.references.swizzle import swizzled, unswizzled
from tests.emulated_cuda.tests import formats

FORMS = {"E4M3": te.DType.kFloat8E4M3, "E5M2": te.DType.kFloat8E5M2}
SHAPE = (3, 64, 288)
"""Rows and columns that are no multiple of 128, and more than two dimensions."""


def values(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal, of very different sizes by row, with a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., :32, :128] = 0
    return x.to(dtype).cuda()


def same(found: torch.Tensor, expected: Any) -> bool:
    return np.array_equal(found.cpu().numpy().reshape(expected.shape), expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_bf16_value_gets_the_code_of_the_nearest_even_or_the_largest(form: str) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]
    assert same(encode(x.float(), FORMS[form]), formats.codes(formats.matrix(x), form))
    assert torch.isnan(encode(torch.tensor([torch.nan]), FORMS[form]).view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("form", FORMS)
def test_delayed_scaling_uses_the_scale_it_was_given_and_collects_the_largest_magnitude(form: str) -> None:
    x = values()
    scale, amax = torch.tensor([0.7], device="cuda"), torch.tensor([1.0], device="cuda")
    found = Float8Quantizer(scale, amax, FORMS[form])(x)
    plain = formats.matrix(x).reshape(-1, SHAPE[-1])
    expected = formats.codes(plain.astype(np.float32) * np.float32(0.7), form)
    assert same(found._data, expected)
    assert same(found._transpose, expected.T)
    assert found._transpose.shape == (288, 3, 64)
    assert amax.item() == np.abs(plain).max()
    assert found._scale_inv.item() == np.float32(1) / np.float32(0.7)
    Float8Quantizer(scale, amax, FORMS[form])(x / 8)
    assert amax.item() == np.abs(plain).max(), "the largest of all since the last update"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_tensorwise_scaling_maps_the_largest_magnitude_onto_the_largest_code(
    form: str, power_of_two: bool
) -> None:
    x = values()
    found = Float8CurrentScalingQuantizer(FORMS[form], device="cuda", force_pow_2_scales=power_of_two)(x)
    plain = formats.matrix(x).reshape(-1, SHAPE[-1])
    scale_of = formats.power_of_two_scale if power_of_two else formats.tensor_scale
    expected, scales = formats.by_blocks(plain, form, plain.shape, scale_of)
    assert same(found._data, expected)
    assert same(found._transpose, expected.T)
    assert found._scale_inv.item() == np.float32(1) / np.float32(scales.item())
    assert found.dequantize().dtype == torch.bfloat16
    assert formats.relative(found.dequantize().reshape(plain.shape), plain) < 2.0 ** (
        -4 if form == "E4M3" else -3
    )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tensorwise_scaling_is_the_reference_that_transformer_engine_ships(
    form: str, power_of_two: bool
) -> None:
    """It has references of this recipe and of NVFP4, on the host."""
    x = values()
    kind = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}[form]
    theirs = CurrentScalingQuantizerRef(kind, pow_2_scales=power_of_two).quantize(x.cpu().flatten(0, 1))
    found = Float8CurrentScalingQuantizer(FORMS[form], device="cuda", force_pow_2_scales=power_of_two)(x)
    assert same(found._data, theirs.data.view(torch.uint8).numpy())
    assert same(found._transpose, theirs.data_t.view(torch.uint8).numpy())
    assert found._scale_inv.item() == theirs.scale.item()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_blockwise_scaling_has_a_scale_for_each_128_values_or_square(dims: int, power_of_two: bool) -> None:
    x = values()
    quantizer = Float8BlockQuantizer(
        FORMS["E4M3"], rowwise=True, columnwise=True, force_pow_2_scales=power_of_two, block_scaling_dim=dims
    )
    found = quantizer(x)
    plain = formats.matrix(x).reshape(-1, SHAPE[-1])
    scale_of = formats.power_of_two_scale if power_of_two else formats.tensor_scale
    ways = (
        (plain, found._rowwise_data, found._rowwise_scale_inv),
        (
            np.ascontiguousarray(plain.T),
            found._columnwise_data,
            found._columnwise_scale_inv,
        ),
    )
    for source, data, scale_inv in ways:
        expected, scales = formats.by_blocks(source, "E4M3", (128 if dims == 2 else 1, 128), scale_of)
        assert same(data, expected)
        inverse = np.float32(1) / scales.astype(np.float32)
        inverse = inverse if dims == 2 else inverse.T
        assert same(scale_inv[: inverse.shape[0], : inverse.shape[1]], inverse)
        assert scale_inv.shape[1] % 4 == 0, "the GEMM reads rows of scales in fours"
    assert found._columnwise_data.shape == (288, 3, 64)
    # Transformer Engine has this direction in plain PyTorch.
    rows = formats.rounded(plain, "E4M3", (128 if dims == 2 else 1, 128), scale_of)
    assert formats.relative(found.dequantize(dtype=torch.float32).reshape(plain.shape), rows) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_mxfp8_has_a_power_of_two_for_each_32_values(form: str) -> None:
    x = values()
    found = MXFP8Quantizer(FORMS[form], rowwise=True, columnwise=True)(x)
    plain = formats.matrix(x).reshape(-1, SHAPE[-1])
    ways = (
        ((1, 32), found._rowwise_data, found._rowwise_scale_inv),
        (
            (32, 1),
            found._columnwise_data,
            found._columnwise_scale_inv,
        ),
    )
    for block, data, scale_inv in ways:
        expected, scales = formats.by_blocks(plain, form, block, formats.mx_scale)
        assert same(data, expected)
        assert same(scale_inv[: scales.shape[0], : scales.shape[1]], (127 - np.log2(scales)).astype(np.uint8))
    rows = formats.rounded(plain, form, (1, 32), formats.mx_scale)
    assert formats.relative(found.dequantize(dtype=torch.float32).reshape(plain.shape), rows) < 1e-6


def test_an_e8m0_scale_is_the_least_power_of_two_that_is_not_below() -> None:
    x = torch.tensor([0.0, 2.0**-127, 1e-40, 1.0, 1.0000001, 3.0, 448.0, 3e38, torch.inf, torch.nan])
    assert e8m0(x).tolist() == [0, 0, 1 if 1e-40 > 2.0**-127 else 0, 127, 128, 129, 136, 254, 254, 255]
    bytes_ = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(e8m0_value(bytes_).double(), 2.0 ** (bytes_.double() - 127))
    assert torch.equal(e8m0_reciprocal(bytes_).double()[:254], 2.0 ** (127 - bytes_.double()[:254]))


@pytest.mark.parametrize("columnwise", [False, True])
def test_swizzled_scales_lie_where_cublas_documents_them(columnwise: bool) -> None:
    scales = torch.randint(256, (8, 256) if columnwise else (256, 8)).to(torch.uint8)
    found = swizzled(scales, columnwise=columnwise)
    matrix = scales.T if columnwise else scales
    flat = found.reshape(-1)
    for row, column in ((0, 0), (5, 3), (37, 2), (127, 7), (200, 4), (255, 7)):
        tile = row // 128 * 2 + column // 4
        place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        assert flat[place] == matrix[row, column]
    assert torch.equal(unswizzled(found, columnwise=columnwise), scales)


QUANTIZERS = {
    "delayed": lambda: Float8Quantizer(
        torch.full((1,), 1 / 16, device="cuda"), torch.zeros(1, device="cuda"), FORMS["E4M3"]
    ),
    "tensorwise": lambda: Float8CurrentScalingQuantizer(FORMS["E4M3"], device="cuda"),
    "blockwise": lambda: Float8BlockQuantizer(FORMS["E4M3"], rowwise=True, columnwise=True),
    "mxfp8": lambda: MXFP8Quantizer(FORMS["E4M3"]),
}


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_new_values_go_into_the_same_memory_and_a_flag_of_1_leaves_the_old_ones(recipe: str) -> None:
    quantizer: Any = QUANTIZERS[recipe]()
    target = quantizer(values())
    places = {name: part.data_ptr() for name, part in vars(target).items() if isinstance(part, torch.Tensor)}
    before = target.dequantize(dtype=torch.float32)
    quantizer.update_quantized(values() * 3, target, noop_flag=torch.ones(1, device="cuda"))
    assert torch.equal(target.dequantize(dtype=torch.float32), before)
    quantizer.update_quantized(values() * 2, target, noop_flag=torch.zeros(1, device="cuda"))
    assert formats.relative(target.dequantize(dtype=torch.float32), values() * 2) < 0.05
    assert places == {
        name: part.data_ptr() for name, part in vars(target).items() if isinstance(part, torch.Tensor)
    }


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_parts_of_a_batch_are_quantised_as_each_alone(recipe: str) -> None:
    import transformer_engine_torch as tex

    x = values((128, 256))
    sections = [32, 0, 96]
    found = tex.split_quantize(x, sections, [QUANTIZERS[recipe]() for _ in sections])
    for part, quantised in zip(x.split(sections), found, strict=True):
        if part.numel():
            alone: Any = QUANTIZERS[recipe]()
            assert torch.equal(
                quantised.dequantize(dtype=torch.float32), alone(part).dequantize(dtype=torch.float32)
            )


def test_the_amax_of_an_empty_or_zero_tensor_gives_the_scale_1() -> None:
    quantizer = Float8CurrentScalingQuantizer(FORMS["E4M3"], device="cuda")
    assert quantizer(torch.zeros(16, 16, device="cuda"))._scale_inv.item() == 1
    assert quantizer(torch.zeros(0, 16, device="cuda")).dequantize().shape == (0, 16)


def test_columns_alone_of_one_scale_are_refused_as_the_library_refuses_them() -> None:
    quantizer = Float8CurrentScalingQuantizer(FORMS["E4M3"], device="cuda", rowwise=False, columnwise=True)
    with pytest.raises(NotImplementedError, match="Columnwise-only per-tensor FP8 quantization"):
        quantizer(values())
