"""The plans of the largest recipes at their full size: what each network card carries, and for how long.

No weights, no ranks: a plan is a pure function of layouts and shapes (tools/sync_plan.py).
"""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.weight_sync.plan import PIECE_BYTES, expert_of, message_bytes
from recipes import recipe
from tools.sync_plan import GOALS, RANKS_PER_NODE, held_by_ranks, model_of, plan_of
from tools.sync_traffic import Links, seconds, traffic


@pytest.fixture(scope="module", params=GOALS)
def synced(request) -> Any:
    run, links = recipe(request.param), Links()
    gc.disable()  # it would look at a million regions again and again, and find nothing
    held = held_by_ranks(run, model_of(run))
    plan = plan_of(run, held)
    counted = traffic(plan, run.layout.ranks, links)
    gc.enable()
    return SimpleNamespace(name=request.param, run=run, held=held, plan=plan, counted=counted, links=links)


def test_the_plan_has_every_parameter_of_the_model(synced):
    values = sum(
        math.prod(shape)
        for name, shape in {
            entry.name: entry.shape
            for bucket in synced.plan.buckets
            for layout in bucket.layouts
            for entry in layout.entries.values()
        }.items()
        if not name.endswith(("_scale_inv", "e_score_correction_bias"))
    )
    assert values == shape_of(synced.run.model.path).total


def test_a_node_receives_each_byte_that_it_needs_and_does_not_hold_exactly_once(synced):
    """By what its ranks hold and their engines serve, without the plan."""
    run, ways = synced.run, synced.run.rollout.sglang.get("ep_size", 1)
    nodes, numbers = run.layout.ranks // RANKS_PER_NODE, dict[Any, int]()
    here = [
        (rank // RANKS_PER_NODE, numbers.setdefault(region, len(numbers)))
        for rank, regions in enumerate(synced.held)
        for region in regions
    ]
    held = np.zeros((nodes, len(numbers)), bool)
    held[tuple(np.array(here).T)] = True
    sizes = np.array([region.nbytes for region in numbers])
    expert = np.array([-1 if (n := expert_of(region.name)) is None else n for region in numbers])
    share = np.where(expert < 0, -1, expert * ways // (expert.max() + 1))
    for node in range(nodes):
        ranks = range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
        served = {rank % run.rollout.tensor_parallel * ways // run.rollout.tensor_parallel for rank in ranks}
        missing = np.isin(share, [-1, *served]) & ~held[node]
        came = synced.counted.across_in.reshape(-1, RANKS_PER_NODE)[node].sum()
        assert 0 <= came - sizes[missing].sum() <= 64 * missing.sum(), "but for the gaps in messages"


def test_the_network_cards_share_the_work(synced):
    assert synced.counted.across_in.max() <= 1.1 * synced.counted.across_in.mean()
    assert synced.counted.across_out.max() <= 1.25 * synced.counted.across_out.mean()


def test_all_ranks_are_sources_and_none_of_more_than_its_share(synced):
    reads = synced.counted.reads
    assert reads.min() > 0 and reads.max() <= 1.25 * reads.mean()


def test_no_rank_sends_more_messages_than_trees_and_its_node_ask_for(synced):
    counted, nodes = synced.counted, synced.run.layout.ranks // RANKS_PER_NODE
    # of its own experts, of those that it serves and of all else the ways may differ; then its node's ranks
    each = 3 * math.ceil(math.log2(nodes)) + RANKS_PER_NODE
    pieces = (counted.across_out + counted.within_out) / PIECE_BYTES
    assert (counted.messages <= each * len(synced.plan.buckets) + pieces).all()


def test_staging_is_half_a_bucket_at_most(synced):
    assert synced.counted.staging <= synced.plan.capacity / 2


def test_what_a_rank_executes_is_what_was_counted(synced):
    """The plan that ranks execute, for a few of them, against the sums over all."""
    counted = synced.counted
    for rank in (0, synced.run.layout.ranks // 2 + 3, synced.run.layout.ranks - 1):
        parts = [bucket.of_rank(rank) for bucket in synced.plan.buckets]
        out = sum(
            message_bytes(regions)
            for part in parts
            for round in part.rounds.values()
            for regions in round.outgoing.values()
        )
        assert out == counted.across_out[rank] + counted.within_out[rank]
        assert sum(message_bytes(part.reads) for part in parts) == counted.reads[rank]


def test_no_round_leaves_most_of_the_network_idle(synced):
    """The time of all rounds, each as long as its busiest card, beside that of as many bytes in one."""
    least = max(synced.counted.across_in.mean(), 1) / synced.links.card_bytes_per_second
    waits = synced.counted.rounds * synced.links.round_seconds
    assert np.isclose(least, 0, atol=1e-6) or synced.counted.across_seconds - waits <= 2 * least


def test_the_computed_sync_meets_its_goal(synced):
    assert seconds(synced.plan, synced.counted, synced.links).total <= GOALS[synced.name]
