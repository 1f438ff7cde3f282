"""Rotary embeddings, forward and backward, computed in fp32.

Answers transformer_engine_torch's csrc/extensions/apply_rope.cpp with common/fused_rope/fused_rope.cu, and
the Triton kernels of megatron-core's fusions/fused_mla_yarn_rope_apply.py. `freqs` [positions, 1, 1, d2]
holds angles: of a head's d numbers the first d2 are turned, the others are copied.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention import refuse_unless, short_name
from .host import on_the_host
from .registry import reference, triton_reference

Tensor = torch.Tensor


def packed_positions(tokens: int, cu_seqlens: Tensor, ranks: int, rank: int) -> Tensor:
    """int64 [tokens]: each token's place in its whole sequence; a rank holds a chunk of either end of it.

    Bounds are of whole sequences. Tokens behind the last one get -1.
    """
    bounds = cu_seqlens.long() // ranks
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = (torch.searchsorted(bounds, token, right=True) - 1).clamp(max=len(bounds) - 2)
    place = chunked(token - bounds[sequence], bounds.diff()[sequence], ranks, rank)
    return torch.where(token < bounds[-1], place, -1)


def chunked(place: Tensor, length: Tensor | int, ranks: int, rank: int) -> Tensor:
    """The place in the whole sequence of one in what the rank holds of it, `length` tokens."""
    if ranks == 1:
        return place
    first, second = (
        place + rank * length // 2,
        place + length * ranks - (rank + 1) * length // 2 - length // 2,
    )
    return torch.where(place < length // 2, first, second)


def positions(
    shape: torch.Size, form: str, start_positions: Tensor | None, cu_seqlens: Tensor | None, ranks: int,
    rank: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """[tokens] for thd, else what broadcasts with the first two dimensions of the operand."""
    if form == "thd":
        refuse_unless(start_positions is None, "fused_rope", "start_positions with thd")
        assert cu_seqlens is not None, "the binding refuses thd without cu_seqlens"
        return packed_positions(shape[0], cu_seqlens, ranks, rank)
    length = shape[0] if form == "sbhd" else shape[1]
    place = chunked(torch.arange(length, device=device), length, ranks, rank)[:, None]
    if start_positions is not None:
        place = place + start_positions.long()[None]
    return place if form == "sbhd" else place.t()


def turned(values: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) becomes (-b, a); a pair is a number of either half, or two neighbours."""
    if interleaved:
        return torch.stack((-values[..., 1::2], values[..., ::2]), -1).flatten(-2)
    first, second = values.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotated(values: Tensor, freqs: Tensor, place: Tensor, interleaved: bool, *, backward: bool) -> Tensor:
    """[..., h, d] turned by the angles of its places, or, for gradients, back."""
    width = freqs.shape[-1]
    known = (place >= 0)[..., None, None]
    angles = freqs[:, 0, 0][place.clamp(min=0)].unsqueeze(-2)
    part = values[..., :width].float()
    if backward:
        part = part * angles.cos() - turned(part * angles.sin(), interleaved)
    else:
        part = part * angles.cos() + turned(part, interleaved) * angles.sin()
    whole = torch.cat((part.to(values.dtype), values[..., width:]), -1)
    return torch.where(known, whole, 0).contiguous()


@reference("fused_rope_forward")
@on_the_host
def fused_rope_forward(
    input: Tensor, freqs: Tensor, start_positions: Tensor | None, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor | None, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Like `input`, contiguous.

    Rows of a packed row behind its last sequence are not written by the kernel: 0 here.
    """
    place = positions(
        input.shape, short_name(qkv_format), start_positions, cu_seqlens, cp_size, cp_rank, input.device
    )
    return rotated(input, freqs, place, interleaved, backward=False)


@reference("fused_rope_backward")
@on_the_host
def fused_rope_backward(
    output_grads: Tensor, freqs: Tensor, start_positions: Tensor | None, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor | None, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """The gradient of fused_rope_forward's input."""
    form, device = short_name(qkv_format), output_grads.device
    place = positions(output_grads.shape, form, start_positions, cu_seqlens, cp_size, cp_rank, device)
    return rotated(output_grads, freqs, place, interleaved, backward=True)


# megatron-core's kernels for latent attention; operands are [rows, heads, width]
def angles_of_rows(
    table: Tensor, rows: int, batch_size: int | None, cu_seqlens: Tensor | None, ranks: int, rank: int
) -> Tensor:
    """[rows, emb_dim] of a table [positions, emb_dim]."""
    if cu_seqlens is None:
        assert batch_size is not None
        place = torch.arange(rows, device=table.device) // batch_size
    else:
        place = packed_positions(rows, cu_seqlens, ranks, rank)
    return table.flatten(0, -2)[place]


def turn_apart(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours (a, b) turned: (a cos - b sin, b cos + a sin), each in a half of its own."""
    first, second = pairs[..., ::2], pairs[..., 1::2]
    cos_left, cos_right = cos.chunk(2, -1)
    sin_left, sin_right = sin.chunk(2, -1)
    return torch.cat((first * cos_left - second * sin_left, second * cos_right + first * sin_right), -1)


def turn_together(halves: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of turn_apart."""
    left, right = halves.chunk(2, -1)
    cos_left, cos_right = cos.chunk(2, -1)
    sin_left, sin_right = sin.chunk(2, -1)
    pairs = (left * cos_left + right * sin_right, right * cos_right - left * sin_left)
    return torch.stack(pairs, -1).flatten(-2)


@triton_reference("rotary_fwd_q_kernel")
@on_the_host
def rotary_fwd_q_kernel(
    grid: Any, Q: Tensor, COS: Tensor, SIN: Tensor, qk_head_dim: int, emb_dim: int, head_num: int,
    batch_size: int | None, seq_num: int | None, cu_seqlens_q: Tensor | None, stride_x_seq: int,
    stride_x_nheads: int, cp_rank: int, cp_size: int, **meta: Any,
) -> None:  # fmt: skip
    """The last emb_dim numbers of queries [rows, heads, qk_head_dim + emb_dim] are turned in place."""
    cos, sin = (
        angles_of_rows(t, len(Q), batch_size, cu_seqlens_q, cp_size, cp_rank)[:, None] for t in (COS, SIN)
    )
    Q[..., qk_head_dim:] = turn_apart(Q[..., qk_head_dim:], cos, sin).to(Q.dtype)


@triton_reference("rotary_bwd_q_kernel")
@on_the_host
def rotary_bwd_q_kernel(
    grid: Any, DO: Tensor, COS: Tensor, SIN: Tensor, qk_head_dim: int, emb_dim: int, head_num: int,
    batch_size: int | None, seq_num: int | None, cu_seqlens_q: Tensor | None, stride_x_seq: int,
    stride_x_nheads: int, cp_rank: int, cp_size: int, **meta: Any,
) -> None:  # fmt: skip
    """The gradient of rotary_fwd_q_kernel, in place."""
    cos, sin = (
        angles_of_rows(t, len(DO), batch_size, cu_seqlens_q, cp_size, cp_rank)[:, None] for t in (COS, SIN)
    )
    DO[..., qk_head_dim:] = turn_together(DO[..., qk_head_dim:], cos, sin).to(DO.dtype)


@triton_reference("rotary_fwd_kv_kernel")
@on_the_host
def rotary_fwd_kv_kernel(
    grid: Any, KV: Tensor, K_POS_EMB: Tensor, O_KEY: Tensor, O_VALUE: Tensor, COS: Tensor, SIN: Tensor,
    emb_dim: int, k_dim: int, v_dim: int, head_num: int, batch_size: int | None, seq_num: int | None,
    cu_seqlens_kv: Tensor | None, stride_kv_seq: int, stride_kv_nheads: int, stride_emb_seq: int,
    stride_k_seq: int, stride_k_nheads: int, stride_v_seq: int, stride_v_nheads: int, cp_rank: int,
    cp_size: int, **meta: Any,
) -> None:  # fmt: skip
    """Keys are those of KV [rows, heads, k_dim + v_dim] and the turned K_POS_EMB, the same for all heads."""
    cos, sin = (angles_of_rows(t, len(KV), batch_size, cu_seqlens_kv, cp_size, cp_rank) for t in (COS, SIN))
    shared = K_POS_EMB.reshape(len(KV), emb_dim)
    O_KEY[..., :k_dim] = KV[..., :k_dim]
    O_KEY[..., k_dim:] = turn_apart(shared, cos, sin).to(O_KEY.dtype)[:, None]
    O_VALUE.copy_(KV[..., k_dim:])


@triton_reference("rotary_bwd_kv_kernel")
@on_the_host
def rotary_bwd_kv_kernel(
    grid: Any, dK: Tensor, dV: Tensor, dKV: Tensor, dEMB: Tensor, COS: Tensor, SIN: Tensor, emb_dim: int,
    k_dim: int, v_dim: int, head_num: int, batch_size: int | None, seq_num: int | None,
    cu_seqlens_kv: Tensor | None, stride_dk_seq: int, stride_dk_nheads: int, stride_dv_seq: int,
    stride_dv_nheads: int, stride_dkv_seq: int, stride_dkv_nheads: int, stride_demb_seq: int, cp_rank: int,
    cp_size: int, **meta: Any,
) -> None:  # fmt: skip
    """The gradients of rotary_fwd_kv_kernel.

    That of the shared part is summed over heads in fp32, and rounded, first.
    """
    cos, sin = (angles_of_rows(t, len(dK), batch_size, cu_seqlens_kv, cp_size, cp_rank) for t in (COS, SIN))
    dKV[..., :k_dim] = dK[..., :k_dim]
    dKV[..., k_dim:] = dV
    summed = dK[..., k_dim:].float().sum(1).to(dEMB.dtype)
    dEMB.copy_(turn_together(summed, cos, sin).view_as(dEMB))
