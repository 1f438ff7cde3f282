"""Two context-parallel ranks, whose parts are merged by hand, against one rank that holds whole sequences."""

from __future__ import annotations

import pytest
import torch

from tests.emulated_cuda.references import context_parallel as cp
from tests.emulated_cuda.references.registry import NoReferenceError
from tests.emulated_cuda.tests.attention_calls import backward, bounds, forward, operands
from tests.emulated_cuda.tests.launched import launch

LENGTHS = (8, 4, 12)
"""Tokens of whole sequences; two ranks hold four chunks of each."""


def rank_rows(rank: int) -> torch.Tensor:
    """Of four equal chunks of each sequence, rank 0 holds the first and the last, rank 1 the two between."""
    starts = bounds(*LENGTHS).tolist()
    chunks = [list(torch.arange(n).add(start).chunk(4)) for start, n in zip(starts, LENGTHS, strict=False)]
    return torch.cat([torch.cat((four[rank], four[3 - rank])) for four in chunks])


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_hold_the_chunks_from_either_end_of_each_sequence(rank):
    whole = bounds(*LENGTHS)
    held = cp.thd_get_partitioned_indices(whole, sum(LENGTHS), 2, rank)
    assert held.dtype == torch.int32 and torch.equal(held.long(), rank_rows(rank))
    row = torch.randn(sum(LENGTHS), 3)
    ordered = cp.thd_sequence_order_to_cp_rank_order(row, whole, 2, sum(LENGTHS))
    assert torch.equal(ordered, torch.cat([row[rank_rows(0)], row[rank_rows(1)]]))
    assert torch.equal(cp.thd_cp_rank_order_to_sequence_order(ordered, whole, 2, sum(LENGTHS)), row)


def parts(tensors, rank):
    return [t[rank_rows(rank)] for t in tensors]


def test_the_first_rank_attends_to_the_second_ranks_keys_never_and_the_second_to_the_firsts():
    """Rank 1 holds chunks 1 and 2 of four: it sees its own, and chunk 0 of rank 0 whole ("lower-triangle").

    Rank 0 holds chunks 0 and 3: its chunk 3 sees both of rank 1's ("upper-triangle").
    """
    q, k, v, do = operands(sum(LENGTHS))
    whole_out, whole_stats, state = forward(q, k, v, bounds(*LENGTHS), bounds(*LENGTHS))
    whole_d = backward(q, k, v, whole_out, do, [whole_stats, state], bounds(*LENGTHS), bounds(*LENGTHS))
    here, half = bounds(*LENGTHS) // 2, bounds(*LENGTHS) // 4
    q0, k0, v0, do0 = parts((q, k, v, do), 0)
    q1, k1, v1, do1 = parts((q, k, v, do), 1)

    out1, stats1, _ = forward(q1, k1, v1, here, here)
    first_k0, first_v0 = (cp.thd_read_half_tensor(t, here, 0) for t in (k0, v0))
    step_out, step_stats, _ = forward(q1, first_k0, first_v0, here, half, mask="PADDING_MASK")
    old = stats1[..., 0].t().contiguous()
    new = torch.logaddexp(old, step_stats[..., 0].t())
    cp.thd_out_correction(out1, step_out, old, new, step_stats[..., 0].t().contiguous(), here, False, True)
    torch.testing.assert_close(new, whole_stats[rank_rows(1), :, 0].t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out1, whole_out[rank_rows(1)], rtol=2**-7, atol=2**-7)

    out0, stats0, _ = forward(q0, k0, v0, here, here)
    second_q0 = cp.thd_read_half_tensor(q0, here, 1)
    step_out, step_stats, _ = forward(second_q0, k1, v1, half, here, mask="PADDING_MASK")
    old, step = stats0[..., 0].t().contiguous(), step_stats[..., 0].t().contiguous()
    new = old.clone()
    cp.thd_second_half_lse_correction(new, step, here, True)
    cp.thd_out_correction(out0, step_out, old, new, step, here, True, True)
    torch.testing.assert_close(new, whole_stats[rank_rows(0), :, 0].t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out0, whole_out[rank_rows(0)], rtol=2**-7, atol=2**-7)

    # gradients of rank 0's queries: of its own keys for all, of rank 1's keys for the second half
    stats = new.t()[..., None]
    dq0, dk0, dv0, *_ = backward(q0, k0, v0, out0, do0, [stats, state], here, here)
    second_stats = cp.thd_read_second_half_lse(new, here, True, len(q0) // 2).t()[..., None]
    second_out, second_do = (cp.thd_read_half_tensor(t, here, 1) for t in (out0, do0))
    dq, *_ = backward(
        second_q0, k1, v1, second_out, second_do, [second_stats, state], half, here, mask="PADDING_MASK"
    )
    cp.thd_grad_correction(dq0, dq, here, "none", "add")
    torch.testing.assert_close(dq0, whole_d[0][rank_rows(0)], rtol=2**-6, atol=2**-6)
    # gradients of rank 0's keys: of its own queries, and of all of rank 1's for the first half
    stats1 = whole_stats[rank_rows(1)]
    _, dk, dv, *_ = backward(
        q1, first_k0, first_v0, out1, do1, [stats1, state], here, half, mask="PADDING_MASK"
    )
    cp.thd_grad_correction(dk0, dk, here, "add", "none")
    cp.thd_grad_correction(dv0, dv, here, "add", "none")
    torch.testing.assert_close(dk0, whole_d[1][rank_rows(0)], rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(dv0, whole_d[2][rank_rows(0)], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kinds", [("copy", "add"), ("add", "copy"), ("copy", "zero"), ("zero", "copy")])
def test_gradients_are_corrected_by_halves_of_each_sequence(kinds):
    held = bounds(4, 2)
    grad, whole, half = torch.ones(6, 1, 8), torch.full((6, 1, 8), 3.0), torch.full((3, 1, 8), 3.0)
    cp.thd_grad_correction(grad, half if "zero" in kinds else whole, held, *kinds)
    expected = {"copy": 3.0, "add": 4.0, "zero": 0.0}
    first, second = (expected[kind] for kind in kinds)
    assert grad[:, 0, 0].tolist() == [first, first, second, second, first, second]


def test_halves_of_keys_and_values_in_one_tensor_are_read_from_both():
    pair = torch.arange(2 * 6 * 8.0).view(2, 6, 1, 8)
    half = cp.thd_read_half_tensor(pair, bounds(4, 2), 1)
    assert torch.equal(half, pair[:, [2, 3, 5]])


def test_statistics_by_sequence_are_corrected_like_packed_ones():
    """lse_packed=False: [b, h, longest]; of two sequences the second is shorter than its row."""
    held, step = bounds(4, 2), torch.zeros(2, 1, 2)
    lse = torch.zeros(2, 1, 4)
    cp.thd_second_half_lse_correction(lse, step, held, False)
    two = torch.tensor(2.0).log().item()
    assert lse[:, 0].tolist() == [
        [0, 0, pytest.approx(two), pytest.approx(two)],
        [0, pytest.approx(two), 0, 0],
    ]


def test_tokens_of_no_padding_are_copied():
    out, given = torch.zeros(6, 2), torch.arange(12.0).view(6, 2) + 1
    cp.thd_copy_valid_tokens_from_per_split_to_rank_local(out, given, bounds(4, 2), bounds(3, 1))
    assert torch.equal(out[[0, 1, 2, 4]], given[[0, 1, 2, 4]]) and not out[[3, 5]].any()


def test_a_correction_that_the_kernel_has_not_is_refused():
    with pytest.raises(NoReferenceError, match="add"):
        cp.thd_grad_correction(torch.ones(2, 1, 8), torch.ones(2, 1, 8), bounds(2), "add", "add")


def test_attention_over_two_ranks_is_that_over_whole_rows():
    """With every way of cp_comm_type that Transformer Engine has for packed rows; None is "p2p"."""
    for code, output in launch("attention_ranks", "p2p", "all_gather", "a2a", ranks=2):
        assert code == 0 and output.count(": alike") == 6, output[-4000:]
