"""Softmax of scaled, masked attention scores.

Answers transformer_engine_torch's csrc/extensions/softmax.cpp with common/fused_softmax/. Computed in fp32,
between tensors of 16 bits; a row whose keys are all masked becomes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import refuse_unless
from .host import on_the_host
from .registry import reference

MASKED = -10000.0
"""What the kernel puts in a masked score's place.

Under the triangular masks it never counts, nor does -inf.
"""


def forward(kernel: str, scores: Tensor, scale: float, masked: Tensor | None) -> Tensor:
    refuse_unless(scores.dtype in (torch.bfloat16, torch.float16), kernel, f"scores of {scores.dtype}")
    scaled = scores.float() * scale
    if masked is None:
        return scaled.softmax(-1).to(scores.dtype)
    weights = scaled.masked_fill(masked, MASKED).softmax(-1)
    return weights.masked_fill(masked.all(-1, keepdim=True), 0).to(scores.dtype)


def backward(output_grads: Tensor, softmax_results: Tensor, scale: float) -> Tensor:
    gradient, weights = output_grads.float(), softmax_results.float()
    whole = weights * (gradient - (weights * gradient).sum(-1, keepdim=True)) * scale
    return whole.to(output_grads.dtype).contiguous()


@reference("scaled_softmax_forward")
@on_the_host
def scaled_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    return forward("scaled_softmax_forward", input, scale_factor, None)


@reference("scaled_masked_softmax_forward")
@on_the_host
def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale_factor: float) -> Tensor:
    """[b, heads, queries, keys]; mask [b or 1, 1, queries, keys] is true, or 1, where a key is masked."""
    return forward("scaled_masked_softmax_forward", input, scale_factor, (mask != 0).expand_as(input))


@reference("scaled_upper_triang_masked_softmax_forward")
@on_the_host
def scaled_upper_triang_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """[b · heads, queries, keys], as many keys as queries."""
    return forward("scaled_upper_triang_masked_softmax_forward", input, scale_factor, _later(input, 1))


@reference("scaled_aligned_causal_masked_softmax_forward")
@on_the_host
def scaled_aligned_causal_masked_softmax_forward(input: Tensor, scale_factor: float) -> Tensor:
    """[b, heads, queries, keys]; the last query stands at the last key."""
    shift = input.shape[-1] - input.shape[-2] + 1
    return forward("scaled_aligned_causal_masked_softmax_forward", input, scale_factor, _later(input, shift))


def _later(scores: Tensor, shift: int) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(shift).expand_as(scores)


for _kind in ("", "_masked", "_upper_triang_masked", "_aligned_causal_masked"):
    reference(f"scaled{_kind}_softmax_backward")(on_the_host(backward))
