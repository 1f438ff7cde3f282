"""The plans of the largest recipes with engines on nodes of their own: what links carry, and messages.

Compared with counts that know nothing of the plan, and with a play of its messages.
"""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_pmd.config import RunConfig
from megatron_pmd.weight_sync.plan import PIECE_BYTES, Region, expert_of
from tools.sync_plan import RANKS_PER_NODE, SEPARATE, held_by_ranks, last_hop_of, model_of, plan_of
from tools.sync_traffic import Links, longest_path, seconds, traffic


@pytest.fixture(scope="module", params=SEPARATE)
def synced(request) -> Any:
    (run, goal), links = SEPARATE[request.param], Links()
    gc.disable()  # it would look at a million regions again and again, and find nothing
    held = held_by_ranks(run, model_of(run))
    plan = plan_of(run, held)
    counted, hop = traffic(plan, run.layout.ranks, links), last_hop_of(run, plan, links)
    gc.enable()
    sizes = {region: region.nbytes for regions in held for region in regions}
    return SimpleNamespace(
        run=run, goal=goal, links=links, held=held, plan=plan, counted=counted, hop=hop, sizes=sizes
    )


def senders(run: RunConfig) -> int:
    """To each engine node: the ranks of these recipes fill nodes."""
    return min(RANKS_PER_NODE, run.layout.ranks // run.layout.engine_nodes)


def test_an_engine_node_receives_the_model_once_however_many_engines_it_has(synced):
    model = sum(synced.sizes.values())
    assert synced.hop.into.tolist() == [model] * synced.run.layout.engine_nodes
    assert model / synced.plan.capacity <= synced.hop.messages <= len(synced.plan.buckets) * RANKS_PER_NODE


def test_all_cards_of_the_ranks_send_equal_shares_to_the_engine_nodes(synced):
    """Each rank belongs to one engine node, and no rank has a node to itself."""
    run, model = synced.run, sum(synced.sizes.values())
    each = model * run.layout.engine_nodes / run.layout.ranks
    assert np.allclose(synced.hop.out, each, atol=synced.hop.messages)


def test_a_node_of_ranks_receives_what_it_does_not_hold_exactly_once(synced):
    """Its ranks together have all of the model in their buckets."""
    nodes = synced.run.layout.ranks // RANKS_PER_NODE
    for node in {0, nodes // 2, nodes - 1}:
        ranks = slice(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
        there = {region for regions in synced.held[ranks] for region in regions}
        missing = [size for region, size in synced.sizes.items() if region not in there]
        came = synced.counted.across_in[ranks].sum()
        assert 0 <= came - sum(missing) <= 64 * len(missing), "but for the gaps in messages"


def test_by_playing_all_messages_of_a_bucket_every_rank_has_what_it_sends_within_the_longest_path(synced):
    """By what each rank executes. A region counts the messages by which it came."""
    bucket, ranks = synced.plan.buckets[0], range(synced.run.layout.ranks)
    regions = [region for regions in bucket.ways.values() for region in regions]
    played = set(regions[:: max(1, len(regions) // 400)])
    parts = [bucket.of_rank(rank) for rank in ranks]
    depth: list[dict[Region, int]] = [dict.fromkeys(played.intersection(part.reads), 0) for part in parts]
    for number in sorted({number for part in parts for number in part.rounds}):
        came = [
            (rank, region, depth[source][region] + 1)
            for rank in ranks
            if number in parts[rank].rounds
            for source, message in parts[rank].rounds[number].incoming.items()
            for region in played.intersection(message)
        ]
        for rank, region, messages in came:
            assert region not in depth[rank], "it comes once"
            depth[rank][region] = messages
    experts, of = 1 + max(expert_of(region.name) or 0 for region in synced.sizes), senders(synced.run)
    for rank, found in enumerate(depth):
        wanted = {
            region
            for region in played
            if (expert := expert_of(region.name)) is None or expert * of // experts == rank % of
        }
        assert wanted <= found.keys()
    longest = longest_path(synced.plan)
    assert max(max(found.values(), default=0) for found in depth) <= longest
    assert longest <= math.ceil(math.log2(synced.run.layout.ranks // RANKS_PER_NODE)) + 1, (
        "over nodes, within"
    )


def test_no_rank_sends_more_messages_than_trees_and_its_node_ask_for(synced):
    """Before the broadcasts to engines: as in test_traffic.py."""
    run, counted = synced.run, synced.counted
    each = 3 * math.ceil(math.log2(run.layout.ranks // RANKS_PER_NODE)) + RANKS_PER_NODE
    pieces = (counted.across_out + counted.within_out) / PIECE_BYTES
    assert (counted.messages <= each * len(synced.plan.buckets) + pieces).all()


def test_staging_is_less_than_a_bucket(synced):
    assert synced.counted.staging < synced.plan.capacity


def test_the_computed_sync_meets_its_goal(synced):
    assert seconds(synced.plan, synced.counted, synced.links, synced.hop).total <= synced.goal
