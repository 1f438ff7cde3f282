"""Rows of several tensors, padded and cut: by torch.cat of each."""

from __future__ import annotations

import torch

from tests.emulated_cuda.references.padding import fused_multi_row_padding, fused_multi_row_unpadding


def test_parts_are_padded_with_zeros_and_cut_again():
    parts = [torch.arange(n * 3.0).view(n, 3).cuda() + 1 for n in (2, 0, 5)]
    lengths, padded = [2, 0, 5], [4, 0, 8]
    out = torch.full((12, 3), 7.0, device="cuda")
    fused_multi_row_padding(torch.cat(parts), out, lengths, padded)
    expected = [torch.nn.functional.pad(p, (0, 0, 0, n - len(p))) for p, n in zip(parts, padded, strict=True)]
    assert torch.equal(out, torch.cat(expected))
    back = torch.empty(7, 3, device="cuda")
    fused_multi_row_unpadding(out, back, padded, lengths)
    assert torch.equal(back, torch.cat(parts))
