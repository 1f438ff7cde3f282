"""Transformer Engine's GEMMs against float64 products of what their operands stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_engine.pytorch import (
    DType,
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
)
from transformer_engine.pytorch.cpp_extensions import general_gemm, general_grouped_gemm

from tests.emulated_cuda.references.registry import NoReferenceError
from tests.emulated_cuda.tests.formats import relative

LAYOUTS = {"TN": "forward", "NN": "gradient of the input", "NT": "gradient of the weight"}
ROWS, INNER, COLUMNS = 48, 64, 80
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
"""Relative norm of what rounding the result once leaves."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).cuda()


def operands(layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a product [ROWS, COLUMNS]: a transposed letter is a matrix with the inner dimension last."""
    a = random(COLUMNS, INNER, dtype=dtype) if layout[0] == "T" else random(INNER, COLUMNS, dtype=dtype)
    b = random(INNER, ROWS, dtype=dtype) if layout[1] == "T" else random(ROWS, INNER, dtype=dtype)
    return a, b


def product(a: torch.Tensor, b: torch.Tensor, layout: str) -> torch.Tensor:
    a, b = a.cpu().double(), b.cpu().double()
    return (b.T if layout[1] == "T" else b) @ (a.T if layout[0] == "T" else a)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_is_that_of_float64_and_rounded_once(layout: str, dtype: torch.dtype) -> None:
    a, b = operands(layout, dtype)
    found, *_ = general_gemm(a, b, dtype, layout=layout)
    assert found.dtype == dtype
    assert relative(found, product(a, b, layout)) < ROUNDING[dtype]


def test_a_gradient_is_added_to_main_grad_in_fp32() -> None:
    a, b = operands("NT", torch.bfloat16)
    main_grad = random(ROWS, COLUMNS, dtype=torch.float32)
    expected = main_grad.cpu().double() + product(a, b, "NT")
    found, *_ = general_gemm(a, b, torch.float32, layout="NT", out=main_grad, accumulate=True, grad=True)
    assert found.data_ptr() == main_grad.data_ptr()
    assert relative(main_grad, expected) < 1e-6
    expected = 2 * main_grad.cpu().double() + product(a, b, "NT") / 2
    general_gemm(
        a, b, torch.float32, layout="NT", out=main_grad, accumulate=True, grad=True, alpha=0.5, beta=2.0
    )
    assert relative(main_grad, expected) < 1e-6


def test_the_bias_is_added_before_rounding_and_its_gradient_is_the_sum_of_the_rows() -> None:
    a, b = operands("TN", torch.bfloat16)
    bias = random(COLUMNS)
    found, *_ = general_gemm(a, b, torch.bfloat16, layout="TN", bias=bias)
    assert relative(found, product(a, b, "TN") + bias.cpu().double()) < ROUNDING[torch.bfloat16]
    a, b = operands("NT", torch.bfloat16)
    _, of_bias, *_ = general_gemm(a, b, torch.bfloat16, layout="NT", bias=bias, grad=True)
    assert relative(of_bias, b.cpu().double().sum(0)) < ROUNDING[torch.bfloat16]


def test_a_gelu_behind_a_product_has_no_reference_and_is_an_error_by_name() -> None:
    with pytest.raises(NoReferenceError, match="a GEMM with a GELU behind it"):
        general_gemm(random(16, 32), random(8, 32), torch.bfloat16, gelu=True)


def test_the_dimensions_of_b_before_its_last_are_those_of_the_result_and_a_mismatch_is_named() -> None:
    found, *_ = general_gemm(random(16, 32), random(3, 5, 32), torch.bfloat16)
    assert found.shape == (3, 5, 16)
    with pytest.raises(RuntimeError, match="Invalid matrix dimensions for GEMM"):
        general_gemm(random(16, 32), random(3, 33), torch.bfloat16)


def test_a_product_over_nothing_is_zero_and_leaves_what_it_would_be_added_to() -> None:
    found, *_ = general_gemm(random(16, 32), random(0, 32), torch.bfloat16)
    assert found.shape == (0, 16)
    kept = torch.ones(32, 16, dtype=torch.float32, device="cuda")
    general_gemm(
        random(0, 16), random(0, 32), torch.float32, layout="NT", out=kept, accumulate=True, grad=True
    )
    assert (kept == 1).all()
    general_gemm(random(0, 16), random(0, 32), torch.float32, layout="NT", out=kept, grad=True)
    assert (kept == 0).all()


def tensorwise(squares: bool) -> Any:
    return Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device="cuda")


def blockwise(squares: bool) -> Any:
    dims = 2 if squares else 1
    return Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=dims)


def mxfp8(squares: bool) -> Any:
    quantizer = MXFP8Quantizer(DType.kFloat8E4M3)
    quantizer.optimize_for_gemm = True
    return quantizer


def by_columns(tensor: Any) -> torch.Tensor:
    """What the columns of a quantised tensor stand for."""
    tensor = tensor.detach()
    tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
    values: torch.Tensor = tensor.dequantize(dtype=torch.float32)
    return values


@pytest.mark.parametrize("quantizer", [tensorwise, blockwise, mxfp8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_fp8_product_is_that_of_what_the_rows_or_columns_stand_for(layout: str, quantizer: Any) -> None:
    shapes = {"TN": ((160, 192), (96, 192)), "NN": ((192, 160), (96, 192)), "NT": ((192, 160), (192, 96))}[
        layout
    ]
    a, b = quantizer(layout != "NT")(random(*shapes[0])), quantizer(False)(random(*shapes[1]))
    plain = (
        a.dequantize(dtype=torch.float32) if layout[0] == "T" else by_columns(a),
        by_columns(b) if layout[1] == "T" else b.dequantize(dtype=torch.float32),
    )
    found, *_ = general_gemm(a, b, torch.float32, layout=layout)
    assert relative(found, product(*plain, layout)) < 1e-6


def test_what_cublas_refuses_is_refused_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="Leading dimension requirement"):
        general_gemm(tensorwise(False)(random(16, 24)), tensorwise(False)(random(16, 24)), torch.bfloat16)
    with pytest.raises(RuntimeError, match="Only 1D by 1D, 1D by 2D, and 2D by 1D"):
        general_gemm(blockwise(True)(random(128, 128)), blockwise(True)(random(128, 128)), torch.bfloat16)
    with pytest.raises(RuntimeError, match="compatible scaling modes"):
        general_gemm(blockwise(True)(random(128, 128)), tensorwise(False)(random(128, 128)), torch.bfloat16)
    with pytest.raises(RuntimeError, match="is missing column-wise usage"):
        general_gemm(
            Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device="cuda", columnwise=False)(random(32, 32)),
            tensorwise(False)(random(32, 32)),
            torch.bfloat16,
            layout="NN",
        )


def test_the_result_in_fp8_is_the_quantised_product() -> None:
    a, b = tensorwise(False)(random(64, 128)), tensorwise(False)(random(32, 128))
    found, *_ = general_gemm(a, b, torch.bfloat16, quantization_params=tensorwise(False))
    plain, *_ = general_gemm(a, b, torch.bfloat16)
    assert torch.equal(found.dequantize(), tensorwise(False)(plain).dequantize())


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_list_of_products_is_each_of_them(accumulate: bool) -> None:
    splits = [16, 0, 48]
    weights, x = [random(80, 64) for _ in splits], random(sum(splits), 64)
    biases = [random(80) for _ in splits]
    whole = torch.full((sum(splits), 80), 7.0, dtype=torch.bfloat16, device="cuda")
    general_grouped_gemm(
        weights, list(x.split(splits)), [whole], [None] * 3, torch.bfloat16, single_output=True,
        m_splits=splits, bias=biases, use_bias=True,
    )  # fmt: skip
    expected = torch.cat(
        [
            product(weight, part, "TN") + bias.cpu().double()
            for weight, part, bias in zip(weights, x.split(splits), biases, strict=True)
        ]
    )
    assert relative(whole, expected) < ROUNDING[torch.bfloat16]
    upstream = random(sum(splits), 80)
    gradients = [torch.ones(80, 64, device="cuda") for _ in splits]
    _, of_biases, _ = general_grouped_gemm(
        list(x.split(splits)), list(upstream.split(splits)), gradients, [None] * 3, torch.float32,
        layout="NT", m_splits=splits, grad=True, use_bias=True, bias=biases, accumulate=accumulate,
    )  # fmt: skip
    for found, of_bias, part, output in zip(
        gradients, of_biases, x.split(splits), upstream.split(splits), strict=True
    ):
        wanted = product(part, output, "NT") + float(accumulate)
        assert (found.cpu().double() - wanted).abs().max() < 1e-4
        assert (of_bias.cpu().double() - output.cpu().double().sum(0)).abs().max() < 1e-4
