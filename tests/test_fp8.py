"""Blockwise FP8, against a float64 transcription of the format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_pmd.fp8 import (
    BLOCK,
    LARGEST,
    blocks_held,
    dequantize,
    is_quantized,
    quantization_config,
    quantize,
    quantized,
)

POSITIVE = [
    2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    for exponent in range(16)
    for mantissa in range(8)
    if (exponent, mantissa) != (15, 7)  # NaN
]
E4M3 = [*POSITIVE, *(-x for x in POSITIVE)]
"""Every finite number of the format: 4 bits of exponent with bias 7, 3 of mantissa, no infinities."""


def transcription(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and the exact quotients that the values have to be next to, in float64, block by block."""
    w = weight.double()
    quotients = torch.empty_like(w)
    scales: list[list[float]] = []
    for i in range(0, w.shape[0], 128):
        scales.append([])
        for j in range(0, w.shape[1], 128):
            block = w[i : i + 128, j : j + 128]
            scale = float(block.abs().max()) / 448 or 1.0
            scales[-1].append(scale)
            quotients[i : i + 128, j : j + 128] = block / scale
    return quotients, torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (130, 200), (1, 5), (300, 127)])
def test_values_are_the_nearest_e4m3_of_the_float64_quotients(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).mul(torch.rand(shape[0], 1) * 3).to(dtype)
    values, scales = quantize(weight)
    quotients, expected = transcription(weight)
    assert values.dtype is torch.float8_e4m3fn and scales.dtype is torch.float32
    assert scales.shape == expected.shape
    torch.testing.assert_close(scales.double(), expected, rtol=1e-7, atol=0)
    table = torch.tensor(E4M3, dtype=torch.float64)
    nearest = (quotients.flatten()[:, None] - table).abs().amin(dim=1).view(shape)
    error = (values.double() - quotients).abs()
    # the quotient is rounded to fp32 before it is rounded to e4m3: half an fp32 step of the largest value
    assert bool((error <= nearest + LARGEST * 2**-24).all())


def test_the_largest_value_of_each_block_comes_back_exactly():
    torch.manual_seed(1)
    weight = torch.randn(256, 256)
    weight[3, 5], weight[200, 10], weight[130, 250], weight[0, 255] = 7.0, -8.0, 16.0, 64.0
    back = dequantize(*quantize(weight))
    for at in ((3, 5), (200, 10), (130, 250), (0, 255)):
        assert back[at] == pytest.approx(float(weight[at]), rel=1e-7)
    # half a step of 3 mantissa bits, or half the smallest step of a block whose largest value is 64
    assert bool(((back - weight).abs() <= weight.abs() / 16 + 64 / 448 * 2**-10).all())


def test_a_block_of_zeros_stays_zero_and_a_value_that_is_not_finite_is_refused():
    values, scales = quantize(torch.zeros(BLOCK, 2 * BLOCK))
    assert not values.float().any() and scales.tolist() == [[1.0, 1.0]]
    weight = torch.ones(BLOCK + 1, 3)
    weight[BLOCK, 2] = torch.nan
    with pytest.raises(ValueError, match="rows 128 to 129"):
        quantize(weight)
    with pytest.raises(ValueError, match="matrices"):
        quantize(torch.ones(3))


NAMES = {
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.0.self_attn.q_a_proj.weight": True,
    "model.layers.0.self_attn.q_b_proj.weight": True,
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": True,
    "model.layers.0.self_attn.kv_b_proj.weight": True,
    "model.layers.0.self_attn.o_proj.weight": True,
    "model.layers.3.mlp.experts.17.gate_proj.weight": True,
    "model.layers.3.mlp.shared_experts.down_proj.weight": True,
    "model.layers.0.mlp.up_proj.weight": True,
    "model.embed_tokens.weight": False,
    "lm_head.weight": False,
    "model.norm.weight": False,
    "model.layers.0.self_attn.q_a_layernorm.weight": False,
    "model.layers.0.self_attn.q_norm.weight": False,
    "model.layers.0.self_attn.q_proj.bias": False,
    "model.layers.3.mlp.gate.weight": False,
    "model.layers.3.mlp.gate.e_score_correction_bias": False,
    "model.layers.3.mlp.shared_expert_gate.weight": False,
    "model.layers.61.eh_proj.weight": False,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_matrices_of_attention_and_experts_are_quantised_and_the_rest_is_not(name, expected):
    assert is_quantized(name) is expected


def test_scales_follow_their_tensor_and_fp8_from_the_actor_passes_as_it_is():
    own = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tensors = [(name, torch.ones(4, 4)) for name in NAMES] + [("model.layers.9.mlp.up_proj.weight", own)]
    sent = dict(quantized(tensors))
    assert [name + "_scale_inv" in sent for name in NAMES] == list(NAMES.values())
    assert sent["model.layers.9.mlp.up_proj.weight"] is own
    assert "model.layers.9.mlp.up_proj.weight_scale_inv" not in sent
    assert sent["lm_head.weight"].dtype is torch.float32


def test_the_configuration_lists_every_matrix_that_keeps_its_precision():
    kept = quantization_config(NAMES)["modules_to_not_convert"]
    assert kept == sorted(n.removesuffix(".weight") for n in NAMES if n.endswith(".weight") and not NAMES[n])


def held_by_transformer_engine(rows: int, columns: int, **changes):
    """A parameter with the attributes of a Float8BlockwiseQTensor, whose scales are powers of two."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scales = torch.exp2(torch.ceil(torch.log2(quantize(weight)[1])))
    values = (weight / dequantize(torch.ones(rows, columns), scales)).to(torch.float8_e4m3fn)
    padded = torch.full((len(scales), -(-scales.shape[1] // 4) * 4), torch.nan)
    padded[:, : scales.shape[1]] = scales
    held = {"rowwise_data": values.view(torch.uint8), "rowwise_scale_inv": padded, "is_2D_scaled": True}
    return SimpleNamespace(get_metadata=lambda: held | changes)


VIEWS = {
    "whole": (lambda p: p, list(range(300))),
    "the gate of a gated MLP": (lambda p: p[:128], list(range(128))),
    "its up-projection": (lambda p: p[128:256], list(range(128, 256))),
    "the rows from a block's start to the end": (lambda p: p[256:], list(range(256, 300))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_blocks_that_a_parameter_holds_leave_with_its_own_bytes_and_scales(name):
    view, rows = VIEWS[name]
    parameter = held_by_transformer_engine(300, 200)
    held = parameter.get_metadata()
    found = blocks_held(parameter, view)
    assert found is not None
    values, scales = found
    assert torch.equal(values.view(torch.uint8), held["rowwise_data"][rows])
    assert torch.equal(scales, held["rowwise_scale_inv"][[row // 128 for row in rows[::128]], :2])
    # quantised anew from what they stand for, they would be others
    assert not torch.equal(quantize(dequantize(values, scales))[1], scales)


def test_the_heads_of_a_fused_qkv_take_the_blocks_of_their_rows():
    parameter = held_by_transformer_engine(2 * 512, 200)
    held = parameter.get_metadata()
    found = blocks_held(parameter, lambda p: p.view(2, 512, *p.shape[1:])[:, 256:384])
    assert found is not None
    values, scales = found
    rows = [*range(256, 384), *range(512 + 256, 512 + 384)]
    assert torch.equal(values.view(torch.uint8), held["rowwise_data"][rows])
    assert torch.equal(scales, held["rowwise_scale_inv"][[2, 6], :2])


@pytest.mark.parametrize(
    "view",
    [lambda p: p[:100], lambda p: p[64:192], lambda p: p.view(4, 75, *p.shape[1:])[:, :64]],
    ids=["ends within a block", "begins within one", "heads smaller than one"],
)
def test_a_cut_through_a_block_cannot_take_its_scale(view):
    assert blocks_held(held_by_transformer_engine(300, 200), view) is None


@pytest.mark.parametrize("changes", [{"is_2D_scaled": False}, {"rowwise_data": None}])
def test_other_forms_of_fp8_are_not_taken_for_blocks(changes):
    assert blocks_held(held_by_transformer_engine(300, 200, **changes), lambda p: p) is None
    assert blocks_held(torch.randn(300, 200), lambda p: p) is None
