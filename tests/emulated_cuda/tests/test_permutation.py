"""Permutation against Transformer Engine's Triton kernels, interpreted, and the worked example there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from megatron.core.transformer.moe import moe_utils

from tests.emulated_cuda.references import permutation  # noqa: F401
from tests.emulated_cuda.tests.interpreted import Call, assert_same_arguments, by_kernel, by_reference

KERNELS = "transformer_engine/common/triton/permutation.py"
TOKENS, EXPERTS, HIDDEN, TOP_K = 9, 3, 6, 2
BLOCK = 4
"""Tokens of a block of the map: several blocks, the last one not full."""
META = {"BLOCK_SIZE": 8}


def map_calls(chosen: torch.Tensor, row_id_map: torch.Tensor, block: int = BLOCK) -> list[Call]:
    """As make_row_id_map launches the three passes."""
    tokens, experts = chosen.shape
    blocks = triton.cdiv(tokens, block)
    grid, strides = (experts, blocks), row_id_map.stride()
    workspace = torch.zeros(grid, dtype=torch.int32)
    width = triton.next_power_of_2(experts * blocks)
    first = (chosen, tokens, *chosen.stride(), *strides, row_id_map, workspace, block)
    second = (row_id_map, workspace, tokens, *strides, width, block)
    third = (row_id_map, *strides, experts, triton.next_power_of_2(experts))
    return [
        Call("_row_id_map_pass_1_kernel", grid, first),
        Call("_row_id_map_pass_2_kernel", grid, second),
        Call("_row_id_map_pass_3_kernel", (tokens,), third),
    ]


def empty_map(tokens: int = TOKENS, experts: int = EXPERTS) -> torch.Tensor:
    """-7 where no kernel writes."""
    return torch.full((tokens, 2 * experts + 1), -7, dtype=torch.int32)


def stride(tensor: torch.Tensor | None, dimensions: int) -> tuple[int | None, ...]:
    return (None,) * dimensions if tensor is None else tensor.stride()


def permute_call(given: Any, row_id_map: Any, probs: Any, scale: Any, pad_offsets: Any, rows: int) -> Call:
    """As permute_with_mask_map launches it; what is not written stays 0."""
    out = given.new_zeros(rows, HIDDEN)
    out_probs = None if probs is None else probs.new_zeros(rows)
    out_scale = None if scale is None else scale.new_zeros(rows, scale.shape[1])
    arguments = (
        given, row_id_map, probs, scale, out_scale, pad_offsets, out, out_probs, 0 if scale is None else 3,
        TOKENS, rows, *row_id_map.stride(), *given.stride(), *out.stride(), *stride(probs, 2),
        *stride(scale, 2), *stride(out_probs, 1), *stride(out_scale, 2), out, out_probs, EXPERTS, HIDDEN,
    )  # fmt: skip
    flags = {"PERMUTE_PROBS": probs is not None, "PERMUTE_SCALE": scale is not None}
    flags["FUSION_PAD"] = pad_offsets is not None
    return Call("_permute_kernel", (TOKENS, 1), arguments, flags | META)


def unpermute_call(given: Any, row_id_map: Any, merging: Any, permuted_probs: Any, pad_offsets: Any) -> Call:
    """As unpermute_with_mask_map launches it."""
    out = given.new_zeros(TOKENS, HIDDEN)
    out_probs = None if permuted_probs is None else permuted_probs.new_zeros(TOKENS, EXPERTS)
    arguments = (
        given, row_id_map, merging, permuted_probs, pad_offsets, out, out_probs, *row_id_map.stride(),
        *given.stride(), *out.stride(), *stride(merging, 2), *stride(permuted_probs, 1),
        *stride(out_probs, 2), out, out_probs, EXPERTS, HIDDEN,
    )  # fmt: skip
    flags = {"PROBS_LOAD_WIDTH": 8, "WITH_MERGING_PROBS": merging is not None}
    flags |= {"PERMUTE_PROBS": permuted_probs is not None, "FUSION_UNPAD": pad_offsets is not None}
    return Call("_unpermute_kernel", (TOKENS, 1), arguments, flags | META)


def backward_call(gradient: Any, row_id_map: Any, given: Any, merging: Any, pad_offsets: Any) -> Call:
    """As unpermute_with_mask_map_bwd_with_merging_probs launches it."""
    out, out_merging = torch.zeros_like(given), torch.zeros_like(merging)
    arguments = (
        gradient, given, merging, row_id_map, pad_offsets, *row_id_map.stride(), *gradient.stride(),
        *out.stride(), *given.stride(), *merging.stride(), *out_merging.stride(), out, out_merging, EXPERTS,
        HIDDEN,
    )  # fmt: skip
    flags = {"PROBS_LOAD_WIDTH": 8, "FUSION_UNPAD": pad_offsets is not None}
    return Call("_unpermute_bwd_with_merging_probs_kernel", (TOKENS,), arguments, flags | META)


def chunk_calls(given: Any, probs: Any, forward: bool) -> list[Call]:
    """As make_chunk_sort_map and sort_chunks_by_map launch them; two rows are behind the last chunk."""
    sizes = torch.tensor([2, 0, 3, 1, 1], dtype=torch.int64)
    order = torch.tensor([2, 0, 4, 1, 3])
    where = torch.full((TOKENS,), -7, dtype=torch.int32)
    out, out_probs = torch.zeros_like(given), None if probs is None else torch.zeros_like(probs)
    arguments = (
        given, where, probs, out, *given.stride(), *out.stride(), *stride(probs, 1), *stride(out_probs, 1),
        out, out_probs, HIDDEN,
    )  # fmt: skip
    flags = {"PERMUTE_PROBS": probs is not None, "FORWARD": forward}
    return [
        Call("_make_chunk_sort_map_kernel", (TOKENS,), (sizes, order, where, 5), {"IDX_LOAD_WIDTH": 8}),
        Call("_sort_chunks_by_map_kernel", (TOKENS, 1), arguments, flags | META),
    ]


def all_calls() -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(TOKENS, EXPERTS, generator=generator)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, probs.topk(TOP_K).indices, True)
    chosen[3] = False  # a token without expert
    probs = probs.masked_fill(~chosen, 0)
    probs[5, probs[5].argmax()] = 0  # padding of the routing map
    row_id_map = empty_map()
    by_reference(map_calls(chosen, row_id_map))
    rows, padded = int(chosen.sum()), 26
    offsets = torch.arange(EXPERTS) * 4

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    half, codes = (
        values(TOKENS, HIDDEN).bfloat16(),
        torch.randint(0, 256, (TOKENS, HIDDEN), dtype=torch.uint8),
    )
    return [
        *map_calls(chosen, empty_map()),
        permute_call(half.float(), row_id_map, None, None, None, rows),
        permute_call(half.float(), row_id_map, probs, None, None, rows),
        permute_call(codes, row_id_map, probs, values(TOKENS, 3), offsets, padded),
        unpermute_call(values(rows, HIDDEN), row_id_map, None, None, None),
        unpermute_call(values(rows, HIDDEN), row_id_map, probs, values(rows), None),
        unpermute_call(values(padded, HIDDEN), row_id_map, None, values(padded), offsets),
        backward_call(values(TOKENS, HIDDEN), row_id_map, values(rows, HIDDEN), probs, None),
        backward_call(values(TOKENS, HIDDEN), row_id_map, values(padded, HIDDEN), probs, offsets),
        *chunk_calls(half.float(), probs[:, 0].contiguous(), True),
        *chunk_calls(half.float(), None, False),
    ]  # fmt: skip


def test_every_reference_leaves_what_its_kernel_leaves(tmp_path):
    calls = all_calls()
    kernels = by_kernel(KERNELS, calls, tmp_path)
    by_reference(calls)
    assert_same_arguments(calls, kernels)


def test_the_map_is_that_of_the_librarys_worked_example():
    """make_row_id_map's comments: five tokens, three experts, blocks of three.

    -7 stands for its useless values.
    """
    chosen = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    row_id_map = empty_map(5, 3)
    by_reference(map_calls(chosen, row_id_map, block=3))
    found = [[row[:n].tolist(), row[3 : 3 + n].tolist()] for row in row_id_map for n in [int(row[6])]]
    assert found == [[[3, 0], [1, 0]], [[5, 1], [2, 0]], [[6], [2]], [[4, 2], [1, 0]], [[], []]]


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, probabilities, routing map) on the device; one token has no expert."""
    generator = torch.Generator().manual_seed(1)
    tokens, probs = (
        torch.randn(TOKENS, 16, generator=generator),
        torch.rand(TOKENS, EXPERTS, generator=generator),
    )
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, probs.topk(TOP_K).indices, True)
    chosen[3] = False
    return tokens.cuda(), (probs * chosen).cuda(), chosen.cuda()


@pytest.mark.parametrize("weighted_at_end", [False, True])
def test_tokens_reach_their_experts_and_come_back_as_in_megatrons_unfused_path(weighted_at_end):
    """Experts multiply by their number + 1, and by the probability, unless the way back does."""
    tokens, probs, chosen = routed()
    counts = chosen.sum(0).tolist()
    found = []
    for fused in (True, False):
        leaves = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        rows, row_probs, order, *_ = moe_utils.permute(
            leaves[0], chosen, None if weighted_at_end else leaves[1], num_out_tokens=sum(counts), fused=fused
        )
        factors = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts)).cuda()[:, None] + 1.0
        rows = rows * factors * (1 if weighted_at_end else row_probs[:, None])
        back = moe_utils.unpermute(
            rows,
            order,
            tokens.shape,
            probs=leaves[1] if weighted_at_end else None,
            routing_map=chosen,
            fused=fused,
        )
        (back * torch.linspace(0, 1, 16).cuda()).sum().backward()
        found.append((back.detach(), leaves[0].grad, leaves[1].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_chunks_are_sorted_as_by_torch_cat():
    rows, probs = torch.randn(9, 16).cuda().requires_grad_(), torch.rand(9).cuda().requires_grad_()
    sizes, order = torch.tensor([2, 0, 4, 3]).cuda(), [2, 0, 3, 1]
    out, out_probs = moe_utils.sort_chunks_by_idxs(
        rows, sizes, torch.tensor(order).cuda(), probs=probs, fused=True
    )
    for ours, given in ((out, rows), (out_probs, probs)):
        parts = given.split(sizes.tolist())
        expected = torch.cat([parts[i] for i in order])
        assert torch.equal(ours, expected)
        weights = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((t * weights).sum(), given, retain_graph=True)[0] for t in (ours, expected)
        ]
        assert torch.equal(*gradients)
