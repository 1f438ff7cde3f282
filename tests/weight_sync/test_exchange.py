"""Messages between ranks, as far as they go without any: their group, and how regions lie in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_pmd.weight_sync.exchange import Exchange, packed, unpacked
from megatron_pmd.weight_sync.plan import Region


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What torch is asked for, and of which group."""
    asked: list[tuple[str, Any]] = []

    def new_group(**options: Any) -> str:
        asked.append(("new_group", options["timeout"].total_seconds()))
        return "own"

    def batch(operations: list[Any]) -> list[Any]:
        asked.extend((operation[0].__name__, operation[3]) for operation in operations)
        return []

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "all_reduce", lambda values, group: asked.append(("all_reduce", group)))
    monkeypatch.setattr(dist, "P2POp", lambda *operation: operation)
    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    return asked


def test_all_ranks_use_the_messages_group_before_the_few_that_send_and_nothing_else_does(asked):
    """NCCL makes a communicator at its first use, by all ranks: it would wait for those that send nothing."""
    control: Any = SimpleNamespace(world=2)
    exchange = Exchange(control, timeout_seconds=7.0)
    exchange.swap([(1, torch.zeros(4, dtype=torch.uint8))], [(1, 8)])
    assert asked == [("new_group", 7.0), ("all_reduce", "own"), ("isend", "own"), ("irecv", "own")]


def test_a_rank_without_messages_asks_for_none(asked):
    control: Any = SimpleNamespace(world=2)
    exchange = Exchange(control, timeout_seconds=7.0)
    asked.clear()
    assert exchange.swap([], []) == [] and asked == []


def test_a_single_rank_has_no_group_and_sums_are_its_own(asked):
    control: Any = SimpleNamespace(world=1)
    values = torch.tensor([3, -(2**63)])
    assert Exchange(control, timeout_seconds=7.0).add_up(values) == [3, -(2**63)] and asked == []


def test_columns_rows_scalars_and_odd_sizes_come_out_of_a_message_as_they_went_in():
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    heads = torch.randn(2, 3, 5)[:, 1:]  # part of a fused matrix: two groups' rows
    regions = [
        Region("columns", "float32", (6, 8), 1, 3, 1),
        Region("rows", "bfloat16", (9, 3), 0, 2, 5),
        Region("heads", "float32", (8, 5), 0, 4, 4),
        Region("scalar", "int64", (), 0, 0, 1),
    ]
    parts = [whole[:, 3:4], torch.randn(5, 3).bfloat16(), heads, torch.tensor(7)]
    for region, before, after in zip(regions, parts, unpacked(regions, packed(regions, parts)), strict=True):
        assert after.shape == region.local_shape and after.dtype == before.dtype
        assert torch.equal(after, before.reshape(region.local_shape))
