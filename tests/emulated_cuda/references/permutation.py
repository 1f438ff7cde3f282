"""Tokens sorted by expert, and back.

Answers the Triton kernels of transformer_engine/common/triton/permutation.py, which
transformer_engine/pytorch/triton/permutation.py launches for megatron-core's fused_permute_with_probs,
fused_permute_and_pad_with_probs, fused_unpermute and fused_sort_chunks_by_index_with_probs. The kernels are
replaced, not their launchers: what these allocate, and the block sizes that the map is made with, stay the
library's own. Operands have the strides that are passed with them.

A row_id_map is int32 [tokens, 2 · experts + 1]: n, the experts of a token, is in its last column; their first
n columns are the rows that the token goes to, from the last row to the first; columns experts to experts + n
are those experts.
"""

from __future__ import annotations

from typing import Any

import torch

from .host import on_the_host
from .registry import triton_reference

Tensor = torch.Tensor


@triton_reference("_row_id_map_pass_1_kernel")
@on_the_host
def row_id_map_pass_1(
    grid: Any, routing_map: Tensor, num_tokens: int, stride_routing_map_token: int,
    stride_routing_map_expert: int, stride_row_id_map_token: int, stride_row_id_map_expert: int,
    row_id_map: Tensor, workspace: Tensor, BLOCK_SIZE: int, **meta: Any,
) -> None:  # fmt: skip
    """Per expert and block of tokens: each routed token's number, from 1 on, and how many there are."""
    routed = routing_map.int()
    for block, rows in enumerate(routed.split(BLOCK_SIZE)):
        numbers = rows.cumsum(0) * rows
        row_id_map[block * BLOCK_SIZE :][: len(rows), : routed.shape[1]] = numbers
        workspace[:, block] = rows.sum(0)


@triton_reference("_row_id_map_pass_2_kernel")
@on_the_host
def row_id_map_pass_2(
    grid: Any, row_id_map: Tensor, workspace: Tensor, num_tokens: int, stride_row_id_map_token: int,
    stride_row_id_map_expert: int, WORKSPACE_LOAD_WIDTH: int, BLOCK_SIZE: int, **meta: Any,
) -> None:  # fmt: skip
    """The numbers become rows, counted over all experts; -1 for no row."""
    before = (workspace.flatten().cumsum(0) - workspace.flatten()).view_as(workspace)
    experts = len(workspace)
    for block in range(workspace.shape[1]):
        numbers = row_id_map[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE, :experts]
        numbers.copy_(torch.where(numbers == 0, -1, numbers + before[:, block] - 1))


@triton_reference("_row_id_map_pass_3_kernel")
@on_the_host
def row_id_map_pass_3(
    grid: Any, row_id_map: Tensor, stride_row_id_map_token: int, stride_row_id_map_expert: int,
    num_experts: int, LOAD_SIZE: int, **meta: Any,
) -> None:  # fmt: skip
    """Each token's rows, from the last one on, then their experts, and how many they are.

    The rest is left.
    """
    rows, experts = row_id_map[:, :num_experts].sort(dim=1, descending=True)
    routed = (rows != -1).sum(1)
    there = torch.arange(num_experts, device=rows.device)[None] < routed[:, None]
    for first, found in ((0, rows), (num_experts, experts.int())):
        part = row_id_map[:, first : first + num_experts]
        part.copy_(torch.where(there, found, part))
    row_id_map[:, 2 * num_experts] = routed.int()


def entries(row_id_map: Tensor, experts: int, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(token, row, expert), int64, of each pair of a token and an expert, token by token."""
    there = torch.arange(experts, device=row_id_map.device)[None] < row_id_map[:, 2 * experts, None]
    token, column = there.nonzero(as_tuple=True)
    row, expert = row_id_map[token, column].long(), row_id_map[token, column + experts].long()
    return token, row if pad_offsets is None else row + pad_offsets[expert].long(), expert


@triton_reference("_permute_kernel")
@on_the_host
def permute(
    grid: Any, input: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: Tensor | None,
    permuted_scale: Tensor | None, pad_offsets: Tensor | None, output_buf: Any, permuted_probs_buf: Any,
    scale_hidden_dim: int, num_tokens: int, num_out_tokens: int, stride_row_id_map_token: int,
    stride_row_id_map_expert: int, stride_input_token: int, stride_input_hidden: int,
    stride_output_token: int, stride_output_hidden: int, stride_probs_token: int | None,
    stride_probs_expert: int | None, stride_scale_token: int | None, stride_scale_hidden: int | None,
    stride_permuted_probs_token: int | None, stride_permuted_scale_token: int | None,
    stride_permuted_scale_hidden: int | None, output: Tensor, permuted_probs: Tensor | None, num_experts: int,
    hidden_size: int, **meta: Any,
) -> None:  # fmt: skip
    """output[row] = input[token]; a pair of probability 0 is padding of the routing map, its row 0."""
    token, row, expert = entries(row_id_map, num_experts, pad_offsets)
    output[row] = input[token]
    if scale is not None:
        assert permuted_scale is not None
        permuted_scale[row] = scale[token]
    if probs is not None:
        assert permuted_probs is not None
        chosen = probs[token, expert]
        permuted_probs[row] = chosen
        output[row[chosen == 0]] = 0


@triton_reference("_unpermute_kernel")
@on_the_host
def unpermute(
    grid: Any, input: Tensor, row_id_map: Tensor, merging_probs: Tensor | None, permuted_probs: Tensor | None,
    pad_offsets: Tensor | None, output_buf: Any, unpermuted_probs_buf: Any, stride_row_id_map_token: int,
    stride_row_id_map_expert: int, stride_input_token: int, stride_input_hidden: int,
    stride_output_token: int, stride_output_hidden: int, stride_merging_probs_token: int | None,
    stride_merging_probs_expert: int | None, stride_permuted_probs_token: int | None,
    stride_unpermuted_probs_token: int | None, stride_unpermuted_probs_expert: int | None, output: Tensor,
    unpermuted_probs: Tensor | None, num_experts: int, hidden_size: int, **meta: Any,
) -> None:  # fmt: skip
    """output[token] = Σ input[row], weighted by merging_probs where they are given, in fp32."""
    token, row, expert = entries(row_id_map, num_experts, pad_offsets)
    rows = input[row].float()
    if merging_probs is not None:
        rows = rows * merging_probs[token, expert].float()[:, None]
    summed = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    output.copy_(summed.index_add_(0, token, rows))
    if permuted_probs is not None:
        assert unpermuted_probs is not None
        unpermuted_probs.zero_()
        unpermuted_probs[token, expert] = permuted_probs[row]


@triton_reference("_unpermute_bwd_with_merging_probs_kernel")
@on_the_host
def unpermute_backward(
    grid: Any, fwd_output_grad: Tensor, fwd_input: Tensor, merging_probs: Tensor, row_id_map: Tensor,
    pad_offsets: Tensor | None, stride_row_id_map_token: int, stride_row_id_map_expert: int,
    stride_fwd_output_grad_token: int, stride_fwd_output_grad_hidden: int, stride_fwd_input_grad_token: int,
    stride_fwd_input_grad_hidden: int, stride_fwd_input_token: int, stride_fwd_input_hidden: int,
    stride_merging_probs_token: int, stride_merging_probs_expert: int, stride_merging_probs_grad_token: int,
    stride_merging_probs_grad_expert: int, fwd_input_grad: Tensor, merging_probs_grad: Tensor,
    num_experts: int, hidden_size: int, **meta: Any,
) -> None:  # fmt: skip
    """The gradients of the rows and of the weights that unpermute took."""
    token, row, expert = entries(row_id_map, num_experts, pad_offsets)
    gradient = fwd_output_grad[token].float()
    weighted = gradient * merging_probs[token, expert].float()[:, None]
    fwd_input_grad[row] = weighted.to(fwd_input_grad.dtype)
    merging_probs_grad.zero_()
    of_weights = (fwd_input[row].float() * gradient).sum(-1)
    merging_probs_grad[token, expert] = of_weights.to(merging_probs_grad.dtype)


@triton_reference("_make_chunk_sort_map_kernel")
@on_the_host
def make_chunk_sort_map(
    grid: Any, split_sizes: Tensor, sorted_indices: Tensor, dst_rows: Tensor, num_splits: int, **meta: Any
) -> None:
    """The row that each token goes to when chunk sorted_indices[i] becomes the i-th.

    Behind the last chunk its own.
    """
    sizes, order = split_sizes.long(), sorted_indices.long()
    ends = sizes.cumsum(0)
    moved = torch.empty_like(ends)
    moved[order] = sizes[order].cumsum(0) - sizes[order]  # where each chunk begins in the output
    token = torch.arange(len(dst_rows), device=dst_rows.device)
    chunk = torch.searchsorted(ends, token, right=True).clamp(max=num_splits - 1)
    row = moved[chunk] + token - (ends - sizes)[chunk]
    dst_rows.copy_(torch.where(token < ends[-1], row, token))


@triton_reference("_sort_chunks_by_map_kernel")
@on_the_host
def sort_chunks_by_map(
    grid: Any, input: Tensor, row_id_map: Tensor, probs: Tensor | None, output_buf: Any,
    stride_input_token: int, stride_input_hidden: int, stride_output_token: int, stride_output_hidden: int,
    stride_probs_token: int | None, stride_permuted_probs_token: int | None, output: Tensor,
    permuted_probs: Tensor | None, hidden_size: int, PERMUTE_PROBS: bool, FORWARD: bool, **meta: Any,
) -> None:  # fmt: skip
    """output[map] = input, or output = input[map] backward; probabilities likewise."""
    where = row_id_map.long()
    for given, moved in ((input, output), (probs, permuted_probs)):
        if given is not None and moved is not None:
            if FORWARD:
                moved[where] = given[: len(where)]
            else:
                moved[: len(where)] = given[where]
