"""Delayed scaling's history, scales from magnitudes, and parameters that several ranks quantise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformer_engine_torch as tex
from transformer_engine.pytorch import (
    DType,
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
)

from tests.emulated_cuda.tests import formats


def random(*shape: int) -> torch.Tensor:
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 2, shape[0])[:, None]
    )
    return x.cuda()


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_the_scale_follows_the_magnitudes_of_the_last_steps(algorithm: str) -> None:
    length, margin = 3, 1.0
    seen = [[4.0, 1.0], [2.0, 0.0], [1.0, 8.0], [0.5, 2.0], [0.25, 2.0]]
    history, scale = torch.zeros(length, 2, device="cuda"), torch.ones(2, device="cuda")
    buffer = torch.zeros(2, device="cuda")
    remembered: list[list[float]] = [[], []]
    expected = [1.0, 1.0]
    for step in seen:
        # a step's magnitudes are in row 0; other ranks' are reduced into the buffer
        history[0] = torch.tensor(step, device="cuda")
        buffer.copy_(history[0] * 2)
        tex.fused_amax_and_scale_update_after_reduction(
            buffer, [history], [scale], algorithm, DType.kFloat8E4M3, margin
        )
        for i, amax in enumerate(step):
            if amax:
                remembered[i] = [*remembered[i], 2 * amax][-length:]
                chosen = max(remembered[i]) if algorithm == "max" else remembered[i][-1]
                expected[i] = 448.0 / 2**margin / chosen
        assert scale.tolist() == pytest.approx(expected)
        if all(step):
            assert history[0].tolist() == [0, 0]


def test_a_magnitude_that_is_0_infinite_or_nan_gives_the_scale_1_and_a_tiny_one_the_largest() -> None:
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-42, 448.0, 100.0], device="cuda")
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    for power_of_two, of_100 in ((False, 4.48), (True, 4.0)):
        tex.multi_tensor_compute_scale_and_scale_inv(
            2048, flag, [[amax], [scale], [inverse]], 448.0, power_of_two, 0.0
        )
        largest = 2.0**127 if power_of_two else float(np.finfo(np.float32).max)
        assert scale.tolist() == pytest.approx([1, 1, 1, largest, 1, of_100])
        assert inverse.tolist() == pytest.approx((1 / scale.double()).tolist())
    tex.multi_tensor_compute_scale_and_scale_inv(
        2048, flag, [[amax], [scale], [inverse]], 448.0, False, 200.0
    )
    assert scale[0].item() == pytest.approx(2.24), "the least magnitude that is allowed"


def test_compute_amax_forgets_what_was_there() -> None:
    amax = torch.tensor([1e9], device="cuda")
    tex.compute_amax(torch.tensor([-3.0, 2.0], device="cuda"), amax)
    assert amax.item() == 3
    tex.compute_amax(torch.empty(0, device="cuda"), amax)
    assert amax.item() == 0


PARTS = (0, 1000, 1001, 30000, 160 * 288)
"""Where each rank's part of a parameter [160, 288] begins, and the end: none at a block's edge."""


def test_ranks_quantise_their_parts_by_blocks_to_what_one_would() -> None:
    weight = random(160, 288)
    quantizer = Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=2)
    expected = quantizer(weight)
    flat, amax = weight.reshape(-1), torch.zeros(2, 4, device="cuda")
    for start, end in itertools.pairwise(PARTS):
        part = torch.empty_like(amax)
        tex.fp8_block_scaling_compute_partial_amax(flat[start:end], part[:, :3], 160, 288, start, 128)
        amax[:, :3] = torch.maximum(amax, part)[:, :3]
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    tex.multi_tensor_compute_scale_and_scale_inv(
        2048, flag, [[amax], [scale], [inverse]], 448.0, quantizer.force_pow_2_scales, quantizer.amax_epsilon
    )
    assert torch.equal(inverse[:, :3], expected._rowwise_scale_inv[:, :3])
    found = torch.zeros(160 * 288, dtype=torch.uint8, device="cuda")
    for start, end in itertools.pairwise(PARTS):
        tex.fp8_block_scaling_partial_cast(
            flat[start:end], found[start:end], scale, 160, 288, start, 128, DType.kFloat8E4M3
        )
    assert torch.equal(found.reshape(160, 288), expected._rowwise_data)


def test_the_gradient_of_a_bias_is_the_sum_of_the_rows_beside_the_quantised_gradient() -> None:
    gradient = random(64, 32).bfloat16()
    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E5M2, device="cuda")
    bias, quantised = tex.bgrad_quantize(gradient, quantizer)
    assert torch.equal(quantised._data, quantizer(gradient)._data)
    assert formats.relative(bias, gradient.cpu().double().sum(0)) < 3e-3
    bias, same = tex.bgrad_quantize(gradient, None)
    assert same.data_ptr() == gradient.data_ptr() and bias.dtype == torch.bfloat16


def test_bytes_are_transposed_and_first_dimensions_swapped() -> None:
    codes = torch.arange(24, dtype=torch.uint8, device="cuda").reshape(2, 3, 4)
    found = tex.fp8_transpose(codes, DType.kFloat8E4M3, out=None)
    assert torch.equal(found.cpu(), codes.cpu().permute(2, 0, 1))
    into = torch.zeros_like(found)
    assert tex.fp8_transpose(codes, DType.kFloat8E4M3, out=into).data_ptr() == into.data_ptr()
    assert torch.equal(into, found)
    assert torch.equal(tex.swap_first_dims(codes, out=None).cpu(), codes.cpu().transpose(0, 1))
