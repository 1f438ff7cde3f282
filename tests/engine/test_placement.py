"""Which ranks run what of an engine."""

from __future__ import annotations

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.engine.placement import EnginePart as Part
from megatron_pmd.engine.placement import part_of, senders_of
from megatron_pmd.errors import LayoutError
from recipes import recipe


def parts(nodes, ranks_per_engine, tensor_parallel):
    return [part_of(rank, nodes, ranks_per_engine, tensor_parallel) for rank in range(len(nodes))]


def test_an_engine_within_a_node_is_its_first_ranks():
    assert parts([0, 0, 1, 1], 2, 2) == [
        Part(0, (0,), (0, 1), 0),
        None,
        Part(1, (1,), (2, 3), 0),
        None,
    ]


def test_an_engine_over_nodes_has_a_part_on_the_first_rank_of_each():
    assert parts([0, 0, 1, 1, 2, 2, 3, 3], 4, 4) == [
        Part(0, (0, 1), (0, 1, 2, 3), 0), None, Part(0, (0, 1), (0, 1, 2, 3), 1), None,
        Part(1, (2, 3), (4, 5, 6, 7), 0), None, Part(1, (2, 3), (4, 5, 6, 7), 1), None,
    ]  # fmt: skip


def test_an_engine_that_computes_on_fewer_ranks_than_share_it_reaches_only_their_nodes():
    assert parts([0, 1, 2, 3], 2, 1) == [
        Part(0, (0,), (0,), 0),
        None,
        Part(1, (2,), (2,), 0),
        None,
    ]
    assert parts([0, 0, 1, 1], 4, 2) == [Part(0, (0,), (0, 1), 0), None, None, None]


def test_two_engines_on_a_node_have_a_leader_each():
    assert parts([5, 5, 5, 5], 2, 2) == [
        Part(0, (5,), (0, 1), 0),
        None,
        Part(1, (5,), (2, 3), 0),
        None,
    ]


def test_unequal_parts_are_refused_with_the_nodes():
    with pytest.raises(LayoutError, match=r"engine 0 .*2 \+ 1 ranks on nodes 0, 1; set tensor_parallel"):
        parts([0, 0, 1, 1, 2, 2], 3, 3)


def test_an_engine_that_would_fit_a_node_is_not_laid_across_two():
    with pytest.raises(LayoutError, match=r"engine 1 of rollout.tensor_parallel=2 would have 1 \+ 1 ranks"):
        parts([0, 0, 0, 0, 1, 1, 1, 1, 2], 3, 2)


def test_a_rank_of_another_engine_hears_of_it_too():
    nodes = [0, 0, 1, 1, 2, 2]
    for rank in range(6):
        with pytest.raises(LayoutError, match="engine 0 "):
            part_of(rank, nodes, 3, 3)


def senders(config: RunConfig, nodes: list[int]) -> list[tuple[int, ...]]:
    return [senders_of(rank, nodes, config) for rank in range(len(nodes))]


SEPARATE = ["layout.data=8", "layout.engine_nodes=2", "sync.transport=broadcast"]


def test_all_ranks_of_an_engine_nodes_engines_send_there_if_they_are_on_one_node():
    """Four engines of two ranks each, two on each engine node."""
    config = override(recipe("tiny_moe_overlap_cpu"), [*SEPARATE, "rollout.ranks_per_engine=2"])
    first, second = (0, 1, 2, 3), (4, 5, 6, 7)
    assert senders(config, [0] * 8) == [first] * 4 + [second] * 4
    assert senders(config, [0, 0, 0, 1, 1, 1, 2, 2]) == [(0, 1, 2)] * 4 + [(4, 5)] * 4


def test_servers_of_one_host_are_sent_to_together():
    urls = '["http://a:1", "http://b:1", "http://a:2", "http://b:2"]'
    settings = ["layout.data=4", "layout.engine_nodes=0", "rollout.ranks_per_engine=null"]
    config = override(
        recipe("tiny_moe_overlap_cpu"), [*settings, f"rollout.servers={urls}", "sync.transport=broadcast"]
    )
    assert senders(config, [0] * 4) == [(0, 2), (1, 3), (0, 2), (1, 3)]
