"""Attention against torch's scaled_dot_product_attention and its gradient, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.emulated_cuda.references import attention
from tests.emulated_cuda.references.registry import NoReferenceError
from tests.emulated_cuda.tests.attention_calls import backward, bounds, forward, member, operands

BF16_STEP = 2**-8
"""Relative distance of two bf16 numbers; half of it is lost by the rounding of the result."""


def plain(operands, allowed, scale=0.3):
    """[q, h, d_v] of one sequence in float64 by torch, keys repeated for their heads."""
    q, k, v = operands
    heads = q.shape[1]
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=allowed, scale=scale
    )
    return out[0].transpose(0, 1)


def lower(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def assert_rounded(given: torch.Tensor, exact: torch.Tensor, *, absolute: float = 1e-3) -> None:
    torch.testing.assert_close(given.double(), exact, rtol=BF16_STEP, atol=absolute)


GRADIENT = 2e-2
"""A gradient takes the sum of outputs times their gradients, with outputs that are rounded already."""


@pytest.mark.parametrize(("heads", "groups", "of_values"), [(4, 4, 16), (4, 2, 16), (4, 1, 8)])
def test_packed_sequences_attend_like_each_alone_and_get_its_gradient(heads, groups, of_values):
    q, k, v, do = operands(12, heads, groups, of_values=of_values)
    lengths = (5, 1, 6)
    out, stats, state = forward(q, k, v, bounds(*lengths), bounds(*lengths))
    d = backward(q, k, v, out, do, [stats, state], bounds(*lengths), bounds(*lengths))
    assert stats.shape == (12, heads, 1) and stats.dtype == torch.float32 and state.shape == (2,)
    assert d[3] is None and d[4] is None
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        leaves = [t[rows].double().requires_grad_() for t in (q, k, v)]
        exact = plain(leaves, lower(length))
        exact.backward(do[rows].double())
        assert_rounded(out[rows], exact.detach())
        for given, leaf in zip(d, leaves, strict=False):
            assert_rounded(given[rows], leaf.grad, absolute=GRADIENT)
        per_head = leaves[1].detach().repeat_interleave(heads // groups, 1)
        products = torch.einsum("qhd,khd->hqk", leaves[0].detach(), per_head) * 0.3
        lse = products.masked_fill(~lower(length), -math.inf).logsumexp(-1).t()
        torch.testing.assert_close(stats[rows, :, 0].double(), lse, rtol=1e-5, atol=1e-5)
        start += length


def test_a_sequence_padded_in_its_row_ends_before_the_padding():
    q, k, v, do = operands(12)
    held, padded = bounds(5, 3), bounds(8, 4)
    out, stats, state = forward(q, k, v, held, held, padded=(padded, padded))
    d = backward(q, k, v, out, do, [stats, state], held, held, padded=(padded, padded))
    assert_rounded(out[8:11], plain((q[8:11], k[8:11], v[8:11]), lower(3)))
    for tensor in (out, *d[:3]):
        assert not tensor[5:8].any() and not tensor[11:].any() and tensor[8:11].any()
    assert stats[5:8].isnan().all() and stats[11:].isnan().all() and not stats[:5].isnan().any()


@pytest.mark.parametrize("form", ["bshd", "sbhd"])
def test_batches_attend_with_statistics_by_head(form):
    q, k, v, do = (t.unflatten(0, (2, 6)) for t in operands(12))
    order = (lambda t: t) if form == "bshd" else (lambda t: t.transpose(0, 1).contiguous())
    layout, whole = "_".join([form.upper()] * 3), bounds(6, 6)
    q_, k_, v_, do_ = map(order, (q, k, v, do))
    out, stats, state = forward(q_, k_, v_, whole, whole, layout=layout, mask="CAUSAL_MASK")
    d = backward(q_, k_, v_, out, do_, [stats, state], whole, whole, layout=layout, mask="CAUSAL_MASK")
    assert stats.shape == (2, 4, 6, 1)
    for index in range(2):
        leaves = [t[index].double().requires_grad_() for t in (q, k, v)]
        exact = plain(leaves, lower(6))
        exact.backward(do[index].double())
        assert_rounded(order(out)[index], exact.detach())
        for given, leaf in zip(d, leaves, strict=False):
            assert_rounded(order(given)[index], leaf.grad, absolute=GRADIENT)


def test_the_last_query_stands_at_the_last_key_with_a_diagonal_from_the_bottom_right():
    q, k, v, _ = operands(7)
    out, *_ = forward(
        q[:3],
        k,
        v,
        bounds(3),
        bounds(7),
        mask="PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
        bottom_right=True,
        window=(2, 0),
    )
    behind = torch.arange(7)[None] - torch.arange(3)[:, None] - 4
    assert_rounded(out, plain((q[:3], k, v), (behind <= 0) & (behind >= -2)))


def test_interleaved_operands_get_interleaved_gradients():
    q, k, v, do = operands(6, groups=4, of_values=16)
    together = torch.stack((q, k, v), 1)
    q_, k_, v_ = together.unbind(1)
    out, stats, state = forward(q_, k_, v_, bounds(6), bounds(6), layout="T3HD")
    d = backward(q_, k_, v_, out, do, [stats, state], bounds(6), bounds(6), layout="T3HD")
    apart = backward(q, k, v, out, do, [stats, state], bounds(6), bounds(6))
    assert (
        d[0].stride() == q_.stride()
        and d[1].untyped_storage().data_ptr() == d[0].untyped_storage().data_ptr()
    )
    for one, other in zip(d[:3], apart[:3], strict=True):
        assert torch.equal(one, other)


def test_the_largest_score_of_each_query_is_told_on_request():
    q, k, v, _ = operands(6)
    _, stats, largest, _ = forward(q, k, v, bounds(6), bounds(6), return_max_logit=True)
    products = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.3
    exact = products.masked_fill(~lower(6), -math.inf).amax(-1).t()
    torch.testing.assert_close(largest[..., 0].double(), exact, rtol=1e-5, atol=1e-5)
    assert (stats >= largest).all()


def test_a_query_without_keys_has_no_output_and_no_gradient():
    q, k, v, do = operands(4)
    out, stats, state = forward(q, k[:0], v[:0], bounds(4), bounds(0), mask="PADDING_MASK")
    d = backward(q, k[:0], v[:0], out, do, [stats, state], bounds(4), bounds(0), mask="PADDING_MASK")
    assert not out.any() and (stats == -math.inf).all() and not d[0].any()


def test_a_packed_row_and_a_batch_become_each_other():
    row, held = torch.arange(24.0).view(6, 2, 2), bounds(1, 3, 2)
    batch = attention.convert_thd_to_bshd(row, held, 3, 4)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 4 - len(part))) for part in row.split([1, 3, 2])]
    assert torch.equal(batch, torch.stack(padded))
    assert torch.equal(attention.convert_bshd_to_thd(batch, held, 6), row)


def test_what_has_no_reference_is_an_error_by_name():
    q, k, v, _ = operands(4)
    with pytest.raises(NoReferenceError, match="queries of torch"):
        forward(q.float(), k.float(), v.float(), bounds(4), bounds(4))
    with pytest.raises(NoReferenceError, match="the layout bhsd"):
        forward(q, k, v, bounds(4), bounds(4), layout="BHSD_BHSD_BHSD")


@pytest.mark.parametrize(
    ("dtype", "width", "of_values", "training", "mask", "answered"),
    [
        ("kBFloat16", 128, 128, True, "PADDING_CAUSAL_MASK", True),
        ("kBFloat16", 192, 128, True, "PADDING_CAUSAL_MASK", True),
        ("kBFloat16", 256, 192, True, "PADDING_CAUSAL_MASK", False),
        ("kBFloat16", 256, 192, False, "PADDING_CAUSAL_MASK", True),
        ("kBFloat16", 100, 100, True, "PADDING_CAUSAL_MASK", False),
        ("kBFloat16", 128, 128, True, "CAUSAL_MASK", False),
        ("kFloat32", 128, 128, True, "PADDING_CAUSAL_MASK", False),
    ],
)
def test_packed_rows_have_the_kernel_that_cudnn_has_on_hopper(
    dtype, width, of_values, training, mask, answered
):
    """From 128 on, 192 and 128 is the only pair of different widths that has gradients."""
    asked = SimpleNamespace(
        qkv_dtype=SimpleNamespace(name=dtype), head_dim_qk=width, head_dim_v=of_values, is_training=training,
        qkv_layout=member("THD_THD_THD"), attn_mask_type=member(mask), max_seqlen_q=8, max_seqlen_kv=8,
    )  # fmt: skip
    kernel, reason = attention.get_fused_attn_backend(asked)
    assert (kernel.name == "NVTE_F16_arbitrary_seqlen") == answered == (not reason)


def test_the_devices_generator_moves_on_as_if_the_kernel_had_drawn():
    generator = torch.cuda.default_generators[0]
    before = generator.get_offset()
    q, k, v, _ = (t.cuda() for t in operands(4))
    *_, state = forward(q, k, v, bounds(4).cuda(), bounds(4).cuda())
    assert state.tolist() == [generator.initial_seed(), before] and state.is_cuda
    assert generator.get_offset() == before + 16
