"""Calls of the attention references as Transformer Engine makes them, and operands for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.emulated_cuda.references import attention


def member(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=f"NVTE_{name}")


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def forward(
    q, k, v, of_q, of_k, *, layout="THD_THD_THD", mask="PADDING_CAUSAL_MASK", window=(-1, -1), **more
):
    form = attention.formats_of(layout.lower())[0].upper()
    bottom = more.pop("bottom_right", False)
    padded = more.pop("padded", (None, None))
    return attention.fused_attn_fwd(
        8, 8, True, more.pop("scale", 0.3), 0.0, True, member(layout), member(form), None, member("NO_BIAS"),
        member(mask), member("VANILLA_SOFTMAX"), window, bottom, of_q, of_k, q, k, v, q.dtype, *padded, None,
        None, None, None, None, None, None, 16, more.pop("return_max_logit", False), False,
    )  # fmt: skip


def backward(q, k, v, o, do, aux, of_q, of_k, *, layout="THD_THD_THD", mask="PADDING_CAUSAL_MASK", **more):
    form = member(attention.formats_of(layout.lower())[0].upper())
    return attention.fused_attn_bwd(
        8, 8, more.pop("scale", 0.3), 0.0, True, member(layout), form, form, member(layout), None, None,
        member("NO_BIAS"), member(mask), member("VANILLA_SOFTMAX"), more.pop("window", (-1, -1)),
        more.pop("bottom_right", False), True, of_q, of_k, q, k, v, o, do, q.dtype, aux,
        *more.pop("padded", (None, None)), None, None, None, False,
    )  # fmt: skip


def operands(tokens, heads=4, groups=2, width=16, of_values=8, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = (
        (tokens, heads, width),
        (tokens, groups, width),
        (tokens, groups, of_values),
        (tokens, heads, of_values),
    )
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]
