"""A rank of test_context_parallel.py: attention over several ranks, against whole rows on one."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te

LENGTHS = (16, 8, 24)
SHAPES = {"grouped": (4, 2, 16, 16), "latent": (4, 4, 24, 16)}
"""Heads, groups of keys, width of queries and keys, width of values."""
TOLERANCE = 2**-6
"""What a rank has from the other's keys is rounded to bf16 before it is added."""


def attention(shape: str, how: str | None) -> te.DotProductAttention:
    heads, groups, width, of_values = SHAPES[shape]
    layer = te.DotProductAttention(
        heads, (width, of_values), num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd",
        attn_mask_type="padding_causal",
    )  # fmt: skip
    if how is not None:
        everyone = list(range(dist.get_world_size()))
        layer.set_context_parallel_group(dist.group.WORLD, everyone, torch.cuda.Stream(), how)
    return layer


def run(layer: Any, operands: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor | None]:
    """[outputs, gradients of queries, keys and values]."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    longest = max(LENGTHS)
    out = layer(
        *leaves, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def held(rank: int, ranks: int) -> torch.Tensor:
    """The rows that a rank holds: of 2 · ranks chunks of each sequence one from either end."""
    parts, start = [], 0
    for length in LENGTHS:
        chunks = torch.arange(start, start + length).chunk(2 * ranks)
        parts += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(parts).cuda()


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    rows = held(rank, ranks)
    for shape, (heads, groups, width, of_values) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        sizes = (heads, width), (groups, width), (groups, of_values), (1, heads * of_values)
        *operands, gradient = (
            torch.randn(sum(LENGTHS), *size, generator=generator).bfloat16().cuda() for size in sizes
        )
        gradient = gradient[:, 0]
        whole = run(attention(shape, None), operands, gradient)
        for how in sys.argv[1:]:
            part = run(attention(shape, how), [t[rows] for t in operands], gradient[rows])
            for name, ours, theirs in zip(("output", "queries", "keys", "values"), part, whole, strict=True):
                assert theirs is not None
                told = f"{shape}, {how}, {name}: "
                torch.testing.assert_close(
                    ours, theirs[rows], rtol=TOLERANCE, atol=TOLERANCE, msg=told.__add__
                )
            print(f"{shape}, {how}: alike", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
