"""Rows of several tensors in one, each padded to a length.

Answers transformer_engine_torch's csrc/extensions/padding.cpp with common/util/padding.cu.
"""

from __future__ import annotations

from torch import Tensor

from .host import on_the_host
from .registry import reference


@reference("fused_multi_row_padding")
@on_the_host
def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_row_list: list[int], padded_input_row_list: list[int]
) -> None:
    """Each part of input [rows, width] is copied into output, with rows of 0 behind it.

    A part of no rows is skipped.
    """
    begin = 0
    for part, length in zip(input.split(input_row_list), padded_input_row_list, strict=True):
        if len(part):
            output[begin : begin + len(part)] = part
            output[begin + len(part) : begin + length] = 0
        begin += length


@reference("fused_multi_row_unpadding")
@on_the_host
def fused_multi_row_unpadding(
    input: Tensor, output: Tensor, input_row_list: list[int], unpadded_input_row_list: list[int]
) -> None:
    """Each part of input loses the rows behind its unpadded length."""
    begin = 0
    for part, length in zip(input.split(input_row_list), unpadded_input_row_list, strict=True):
        output[begin : begin + length] = part[:length]
        begin += length
