"""Rotary embeddings against Transformer Engine's unfused ones, and megatron-core's Triton kernels."""

from __future__ import annotations

import pytest
import torch
from transformer_engine.pytorch.attention import rope

from tests.emulated_cuda.tests.interpreted import Call, assert_same_arguments, by_kernel, by_reference

LENGTHS = (8, 4, 12)
WIDTH, TURNED = 16, 8
"""Numbers of a head, and those of them that are turned."""


def angles(positions: int, width: int = TURNED) -> torch.Tensor:
    return torch.randn(positions, 1, 1, width, generator=torch.Generator().manual_seed(1)).cuda() * 3


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("form", "rank", "ranks"), [("thd", 0, 1), ("thd", 1, 2), ("sbhd", 0, 1), ("bshd", 0, 2)]
)
def test_the_fused_embedding_is_the_unfused_one_and_has_its_gradient(form, rank, ranks, interleaved):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda() if form == "thd" else None
    shape = (sum(LENGTHS) // ranks, 3, WIDTH) if form == "thd" else (6, 2, 3, WIDTH)
    given, gradient = values(*shape), values(*shape, seed=2)
    found = []
    for fused in (True, False):
        leaf = given.clone().requires_grad_()
        out = rope.apply_rotary_pos_emb(
            leaf, angles(12), form, None, interleaved, fused, bounds, cp_size=ranks, cp_rank=rank
        )
        out.backward(gradient)
        found.append((out.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        # the unfused one rounds cosines to bf16
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=2**-5)


def latent_calls(bounds: torch.Tensor | None, batch: int | None, rank: int, ranks: int) -> list[Call]:
    """As megatron-core's ApplyMLARotaryEmbQ and ApplyMLARotaryEmbKV launch their four kernels."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, plain, turned, of_values = 12, 3, 8, 8, 4

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    table = numbers(24, 1, 1, turned)
    cos, sin = table.cos(), table.sin()
    sequences = None if bounds is None else len(bounds) - 1
    where = (heads, batch, sequences, bounds)
    query, kv = numbers(rows, heads, plain + turned), numbers(rows, heads, plain + of_values)
    shared, key, value = (
        numbers(rows, 1, turned),
        numbers(rows, heads, plain + turned),
        numbers(rows, heads, of_values),
    )
    d_kv, d_shared = torch.zeros_like(kv), torch.zeros_like(shared)
    strides = [t.stride(i) for t in (query, kv, key, value) for i in (0, 1)]
    kv_strides = (*strides[2:4], shared.stride(0), *strides[4:])
    backward_strides = (*strides[4:], *strides[2:4], shared.stride(0))
    sizes = (turned, plain, of_values)
    meta = {"BLOCK_H": 4}
    turn, sides = (cos, sin, plain, turned, *where, *strides[:2], rank, ranks), (cos, sin, *sizes, *where)
    forward = (kv, shared, torch.zeros_like(key), torch.zeros_like(value), *sides, *kv_strides, rank, ranks)
    backward = (key, value, d_kv, d_shared, *sides, *backward_strides, rank, ranks)
    return [
        Call("rotary_fwd_q_kernel", (rows, 1), (query, *turn), meta),
        Call("rotary_bwd_q_kernel", (rows, 1), (query.clone(), *turn), meta),
        Call("rotary_fwd_kv_kernel", (rows, 1), forward, meta),
        Call("rotary_bwd_kv_kernel", (rows, 1), backward, meta),
    ]


def test_latent_attentions_references_leave_what_the_kernels_leave(tmp_path):
    packed = torch.tensor([0, 8, 12, 24], dtype=torch.int32)
    calls = [*latent_calls(packed, None, 1, 2), *latent_calls(None, 2, 0, 1)]
    kernels = by_kernel("megatron/core/fusions/fused_mla_yarn_rope_apply.py", calls, tmp_path)
    by_reference(calls)
    assert_same_arguments(calls, kernels)
