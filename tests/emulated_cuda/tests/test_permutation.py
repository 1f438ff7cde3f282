"""The references of Transformer Engine's permutation against its Triton kernels, interpreted, and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from tests.emulated_cuda.references import permutation
from tests.emulated_cuda.tests.interpreted import interpreted, launch

TOKENS, EXPERTS, HIDDEN, TOP_K = 21, 5, 24, 2
BLOCK = 8
"""Tokens of a block of the map: several blocks, the last one not full."""


@pytest.fixture(scope="module")
def kernels() -> Any:
    return interpreted("transformer_engine", "common/triton/permutation.py")


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    """(map, probabilities), [tokens, experts]; one token has no expert, one pair the probability 0."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(TOKENS, EXPERTS, generator=generator)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, probs.topk(TOP_K).indices, True)
    chosen[3] = False
    probs = probs.masked_fill(~chosen, 0)
    probs[5, probs[5].argmax()] = 0
    return chosen, probs


def make_map(call: Any, chosen: torch.Tensor) -> torch.Tensor:
    """As make_row_id_map launches the three passes; `call` runs a kernel by its name."""
    row_id_map = torch.full((TOKENS, 2 * EXPERTS + 1), -7, dtype=torch.int32)
    blocks = triton.cdiv(TOKENS, BLOCK)
    grid = (EXPERTS, blocks)
    workspace = torch.zeros(grid, dtype=torch.int32)
    call("_row_id_map_pass_1_kernel", grid, chosen, TOKENS, *chosen.stride(), *row_id_map.stride(), row_id_map, workspace, BLOCK)  # fmt: skip
    width = triton.next_power_of_2(EXPERTS * blocks)
    call("_row_id_map_pass_2_kernel", grid, row_id_map, workspace, TOKENS, *row_id_map.stride(), width, BLOCK)
    call("_row_id_map_pass_3_kernel", (TOKENS,), row_id_map, *row_id_map.stride(), EXPERTS, 8)
    return row_id_map


def by_reference(name: str, grid: Any, *arguments: Any, **meta: Any) -> None:
    from tests.emulated_cuda.references.registry import TRITON

    TRITON[name](grid, *arguments, **meta)


def by_kernel(kernels: Any) -> Any:
    def call(name: str, grid: Any, *arguments: Any, **meta: Any) -> None:
        launch(getattr(kernels, name), grid, *arguments, **meta)

    return call


def test_the_map_of_rows_is_that_of_the_kernels(kernels):
    chosen, _ = routing()
    assert torch.equal(make_map(by_reference, chosen), make_map(by_kernel(kernels), chosen))
