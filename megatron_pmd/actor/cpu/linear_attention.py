"""The kernels of a gated delta net for packed rows, by torch: what flash-linear-attention has for CUDA alone.

megatron-core has the rule itself in torch (`torch_chunk_gated_delta_rule`), for sequences of one length: the
row is laid out as one padded batch, so that no state passes from one sequence into the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

from megatron_pmd.actor.cpu.attention import batched, places


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x with vectors of length 1 in its last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """A convolution over each token and those before it in its sequence, and SiLU.

    x [1, tokens, channels]; weight [channels, width], the last for the token itself.
    """
    assert activation in ("silu", "swish") and bias is None
    place, width = places(cu_seqlens.long())[1], weight.size(1)
    total = torch.zeros_like(x)
    for before in range(width):
        shifted = F.pad(x, (0, 0, before, 0))[:, : x.size(1)]
        total = total + shifted * (place >= before)[:, None] * weight[:, width - 1 - before]
    return F.silu(total), None


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value [1, tokens, heads, dim], g and beta [1, tokens, heads]; the result is as value."""
    sequence, place = places(cu_seqlens.long())
    shape = (len(cu_seqlens) - 1, int(cu_seqlens.diff().max()))
    output, _ = torch_chunk_gated_delta_rule(
        *(batched(x[0], sequence, place, shape) for x in (query, key, value, g, beta))
    )
    return output[sequence, place][None], None
