"""Packed rows under context parallelism: halves of sequences, and the merging of several ranks' keys.

Answers the thd_* functions of transformer_engine_torch's csrc/extensions/attention.cpp and their kernels,
common/fused_attn/context_parallel.cu. A rank holds two chunks of each sequence, one of each end; the first
and the second half of what it holds of a sequence are those chunks. `cu_seqlens` int32 [sequences + 1] bounds
the sequences as the rank holds them, unless a function says that they are whole.
"""

from __future__ import annotations

import torch

from .host import on_the_host
from .registry import NoReferenceError, reference

Tensor = torch.Tensor


def half_rows(cu_seqlens: Tensor, second: bool) -> Tensor:
    """int64 [tokens / 2]: where the tokens of each sequence's first or second half stand."""
    half = cu_seqlens.long() // 2
    token = torch.arange(int(half[-1]), device=cu_seqlens.device)
    sequence = torch.searchsorted(half, token, right=True) - 1
    return token + half[sequence + int(second)]


@reference("thd_read_half_tensor")
@on_the_host
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """[tokens / 2, h, d] of [tokens, h, d], or [2, tokens / 2, h, d] of [2, tokens, h, d].

    Behind the last sequence the kernel writes nothing; here stands 0.
    """
    dim = tensor.dim() - 3
    shape = list(tensor.shape)
    shape[dim] //= 2
    half = tensor.new_zeros(shape)
    rows = half_rows(cu_seqlens, bool(half_idx))
    half.narrow(dim, 0, len(rows)).copy_(tensor.index_select(dim, rows))
    return half


def _statistics(
    lse: Tensor, cu_seqlens: Tensor, second: bool, packed: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(index into lse, index into that of a step) of each token that the step has.

    Statistics are [heads, tokens] if packed, else [b, h, s].
    """
    bounds = cu_seqlens.long() // 2 if second else cu_seqlens.long()
    token = torch.arange(int(bounds[-1]), device=lse.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    if packed:
        heads = torch.arange(lse.shape[0], device=lse.device)[:, None]
        whole = token + bounds[sequence + 1] if second else token
        return (heads, whole[None]), (heads, token[None])
    heads = torch.arange(lse.shape[1], device=lse.device)[:, None]
    column = token - bounds[sequence]
    whole = column + bounds.diff()[sequence] if second else column
    return (sequence[None], heads, whole[None]), (sequence[None], heads, column[None])


@reference("thd_second_half_lse_correction")
@on_the_host
def thd_second_half_lse_correction(
    lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool
) -> None:
    """lse of the second halves becomes log(e^lse + e^lse_per_step), in place."""
    whole, step = _statistics(lse, cu_seqlens, True, lse_packed)
    lse[whole] = torch.logaddexp(lse[whole], lse_per_step[step])


@reference("thd_read_second_half_lse")
@on_the_host
def thd_read_second_half_lse(
    lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int
) -> Tensor:
    """lse of the second halves, fp32 [heads, second_half_lse_seqlen] or [b, h, second_half_lse_seqlen]."""
    half = lse.new_zeros(*lse.shape[:-1], second_half_lse_seqlen)
    whole, step = _statistics(lse, cu_seqlens, True, lse_packed)
    half[step] = lse[whole]
    return half


@reference("thd_out_correction")
@on_the_host
def thd_out_correction(
    out: Tensor, out_per_step: Tensor, old_lse: Tensor, lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor,
    only_second_half: bool, lse_packed: bool,
) -> None:  # fmt: skip
    """out becomes out e^(old_lse - lse) + out_per_step e^(lse_per_step - lse), in place.

    Both are [tokens, h, d]. What a token of no key has from a step (0, with -inf) adds nothing.
    """
    whole, step = _statistics(lse, cu_seqlens, bool(only_second_half), lse_packed)
    rows = (
        half_rows(cu_seqlens, True)
        if only_second_half
        else torch.arange(int(cu_seqlens[-1]), device=out.device)
    )
    width = out.shape[-2:]
    flat, flat_step = out.view(-1, *width), out_per_step.reshape(-1, *width)
    before, added = flat[rows].float(), flat_step[: len(rows)].float()
    kept = (old_lse[whole] - lse[whole]).exp().t()[..., None]
    gained = (lse_per_step[step] - lse[whole]).exp().t()[..., None]
    flat[rows] = (_scaled(before, kept) + _scaled(added, gained)).to(out.dtype)


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, values * factor)


CORRECTIONS = (("add", "copy"), ("add", "none"), ("copy", "none"), ("copy", "zero"))
"""What the kernel does with the halves, in either order."""


@reference("thd_grad_correction")
@on_the_host
def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Halves of grad are copied from a step's gradient, added to it in grad's dtype, set to 0 or left.

    [tokens, h, d] or [2, tokens, h, d]. With one of the halves "none" or "zero" a step has only the other
    one.
    """
    dim = grad.dim() - 3
    kinds = (first_half, second_half)
    if kinds not in CORRECTIONS and kinds[::-1] not in CORRECTIONS:
        raise NoReferenceError(f"thd_grad_correction: the kernel does not take {kinds}")
    whole = set(kinds) <= {"add", "copy"}
    for second, kind in enumerate(kinds):
        rows = half_rows(cu_seqlens, bool(second))
        if kind == "zero":
            grad.index_fill_(dim, rows, 0)
        elif kind != "none":
            given = (
                grad_per_step.index_select(dim, rows) if whole else grad_per_step.narrow(dim, 0, len(rows))
            )
            if kind == "add":
                given = grad.index_select(dim, rows) + given
            grad.index_copy_(dim, rows, given)


def rank_order(cu_seqlens: Tensor, tokens: int, ranks: int) -> Tensor:
    """int64 [tokens]: where in the row of whole sequences stands what rank 0 holds, then rank 1, and so on.

    Bounds are of whole sequences.
    """
    bounds = cu_seqlens.long() // ranks
    token = torch.arange(tokens // ranks, device=cu_seqlens.device)
    sequence = (torch.searchsorted(bounds, token, right=True) - 1).clamp(max=len(bounds) - 2)
    chunk = bounds.diff()[sequence] // 2
    place = token - bounds[sequence]
    rank = torch.arange(ranks, device=cu_seqlens.device)[:, None]
    which = torch.where(place < chunk, rank, 2 * (ranks - 1) - rank)
    return (place + bounds[sequence] * ranks + chunk * which).flatten()


@reference("thd_get_partitioned_indices")
@on_the_host
def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """int32 [total_tokens / world_size]: where the rank's tokens stand in the whole row."""
    return rank_order(cu_seqlens, total_tokens, world_size).view(world_size, -1)[rank].int()


@reference("thd_sequence_order_to_cp_rank_order")
@on_the_host
def thd_sequence_order_to_cp_rank_order(
    inp: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int
) -> Tensor:
    """[tokens, ...] in the order of the ranks."""
    return inp[rank_order(cu_seqlens, total_tokens, cp_size)]


@reference("thd_cp_rank_order_to_sequence_order")
@on_the_host
def thd_cp_rank_order_to_sequence_order(
    inp: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int
) -> Tensor:
    """[tokens, ...] in the order of the sequences."""
    out = torch.empty_like(inp, memory_format=torch.contiguous_format)
    out[rank_order(cu_seqlens, total_tokens, cp_size)] = inp
    return out


@reference("thd_copy_valid_tokens_from_per_split_to_rank_local")
@on_the_host
def thd_copy_valid_tokens_from_per_split_to_rank_local(
    out: Tensor, inp: Tensor, cu_seqlens_padded: Tensor, cu_seqlens: Tensor
) -> None:
    """Copies the tokens of each sequence that are no padding.

    Sequences begin where cu_seqlens_padded says, and have the lengths of cu_seqlens.
    """
    starts, lengths = cu_seqlens_padded.long(), cu_seqlens.diff().long()
    token = torch.arange(len(inp), device=inp.device)
    sequence = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    known = sequence < len(lengths)
    sequence = sequence.clamp(max=len(lengths) - 1)
    place = token - starts[sequence]
    rows = token[known & (place >= 0) & (place < lengths[sequence])]
    out[rows] = inp[rows]
