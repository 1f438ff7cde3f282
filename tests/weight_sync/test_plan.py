"""Who writes what into which bucket, without any rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.plan import Plan, Region, Round, lay_out, make_plan, word_bytes
from megatron_pmd.weight_sync.readers import Readers, only_the_driver, readers_of


def rows(name: str, start: int, length: int, total: int = 8) -> Region:
    return Region(name, "bfloat16", (total, 16), 0, start, length)


def halves(*names: str) -> list[list[Region]]:
    """Two tensor-parallel ranks, each with half of every tensor."""
    return [[rows(name, start, 4) for name in names] for start in (0, 4)]


def shared(nodes: list[int], targets: list[int]) -> Readers:
    """A bucket in the shared memory of each of these nodes."""
    firsts = [nodes.index(node) for node in targets]
    return readers_of(
        nodes, [(rank,) if rank in firsts else () for rank in range(len(nodes))], on_device=False
    )


def one(ranks: int = 1) -> Readers:
    return shared([0] * ranks, [0])


def arrivals(plan: Plan, ranks: int) -> dict[int, list[Region]]:
    """By rank, what it has in the end, were all messages sent; fails for one that sends what it has not."""
    has: dict[int, list[Region]] = {rank: [] for rank in range(ranks)}
    for bucket in plan.buckets:
        parts = {rank: bucket.of_rank(rank) for rank in range(ranks)}
        here = {rank: list(part.reads) for rank, part in parts.items()}
        for number in sorted({number for part in parts.values() for number in part.rounds}):
            now = {rank: part.rounds.get(number, Round()) for rank, part in parts.items()}
            for rank, round in now.items():
                for target, regions in round.outgoing.items():
                    assert all(region in here[rank] for region in regions)
                    assert now[target].incoming[rank] == regions
            for rank, round in now.items():
                for source, regions in round.incoming.items():
                    assert now[source].outgoing[rank] == regions
                    here[rank] += regions
        for rank, regions in here.items():
            has[rank] += regions
    return has


def moves(plan: Plan, ranks: int) -> list[tuple[str, int, int, int]]:
    """(name, start, source, target) of what is sent."""
    return [
        (region.name, region.start, rank, target)
        for bucket in plan.buckets
        for rank in range(ranks)
        for round in bucket.of_rank(rank).rounds.values()
        for target, regions in round.outgoing.items()
        for region in regions
    ]


def test_every_region_is_there_once_on_every_node_that_needs_it():
    held = halves("a", "b", "c") * 2  # two replicas, one a node
    plan = make_plan(held, shared([0, 0, 1, 1], [0, 1]), capacity=10_000)
    has = arrivals(plan, 4)
    for node in (0, 1):
        there = [region for rank in (2 * node, 2 * node + 1) for region in has[rank]]
        assert sorted((r.name, r.start) for r in there) == [(n, s) for n in "abc" for s in (0, 4)]
    assert not moves(plan, 4)


def test_of_replicas_one_counts_the_words():
    plan = make_plan(halves("a", "b") * 2, shared([0, 0, 1, 1], [0, 1]), capacity=10_000)
    counted = [(r.name, r.start) for b in plan.buckets for k in range(4) for r in b.of_rank(k).counted]
    assert sorted(counted) == [("a", 0), ("a", 4), ("b", 0), ("b", 4)]


def test_replicas_on_a_node_take_turns():
    held = [[Region.whole(f"t{i}", "float32", (64,)) for i in range(8)] for _ in range(4)]
    plan = make_plan(held, one(4), capacity=10_000)
    assert [sum(len(b.of_rank(rank).reads) for b in plan.buckets) for rank in range(4)] == [2] * 4


def test_what_only_another_node_holds_is_sent_to_one_rank_there():
    """Two pipeline stages, a node each."""
    plan = make_plan([*halves("a"), *halves("b")], shared([0, 0, 1, 1], [0, 1]), capacity=10_000)
    assert sorted(moves(plan, 4)) == [("a", 0, 0, 2), ("a", 4, 1, 3), ("b", 0, 2, 0), ("b", 4, 3, 1)]


def test_a_node_without_engines_gets_nothing_but_sends_what_it_holds():
    plan = make_plan([*halves("a"), *halves("b")], shared([0, 0, 1, 1], [1]), capacity=10_000)
    assert sorted(moves(plan, 4)) == [("a", 0, 0, 2), ("a", 4, 1, 3)]
    assert plan.kinds == {2: 0}


def test_each_node_gets_a_tensor_once_and_the_last_of_five_in_the_third_round():
    held = [[Region.whole("w", "float32", (64,))], [], [], [], []]
    plan = make_plan(held, shared([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), capacity=10_000)
    assert sorted(target for *_, target in moves(plan, 5)) == [1, 2, 3, 4]
    [bucket] = plan.buckets
    assert list(bucket.of_rank(0).rounds) == [(0, 0), (1, 0), (2, 0)]
    assert list(bucket.of_rank(4).rounds) == [(2, 0)]
    assert set(arrivals(plan, 5)) == {0, 1, 2, 3, 4}


def test_the_driver_alone_is_sent_what_engines_do_not_open():
    plan = make_plan(
        [*halves("a"), *halves("b")], only_the_driver([0, 0, 1, 1], on_device=True), capacity=9999
    )
    assert sorted(moves(plan, 4)) == [("a", 4, 1, 0), ("b", 0, 2, 0), ("b", 4, 3, 0)]


def expert(layer: int, number: int) -> Region:
    return Region.whole(f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight", "bfloat16", (8, 16))


def test_an_expert_goes_to_the_ranks_that_serve_it_and_no_others():
    """Four engines of two ranks on two nodes, their experts over both; each pipeline stage has a node."""
    held = [[expert(rank // 4, rank % 4), rows(f"dense{rank // 4}", 0, 8)] for rank in range(8)]
    serves = [(rank, rank + 1) if rank % 2 == 0 else () for rank in range(8)]
    readers = readers_of([0] * 4 + [1] * 4, serves, on_device=True, expert_parallel=2)
    plan = make_plan(held, readers, capacity=10_000)
    assert plan.kinds == {rank: rank % 2 for rank in range(8)}
    for rank, regions in arrivals(plan, 8).items():
        layout = [name for bucket in plan.buckets for name in bucket.layouts[rank % 2].entries]
        experts = [expert(layer, 2 * (rank % 2) + i).name for layer in (0, 1) for i in (0, 1)]
        assert sorted(layout) == sorted(["dense0", "dense1", *experts])
        assert {region.name for region in regions} >= set(layout)
    across = [(name, target) for name, _, source, target in moves(plan, 8) if source // 4 != target // 4]
    assert len(across) == len(set(across)) == 8 + 2, "each once to each of the other node's places"


def test_each_bucket_has_as_much_of_every_pipeline_stage():
    """In the order of the layers, two ranks at a time would feed all others."""
    held = [
        [Region.whole(f"layers.{8 * rank + i}.w", "float32", (64,)) for i in range(8)] for rank in range(4)
    ]
    plan = make_plan(held, shared([0, 1, 2, 3], [0, 1, 2, 3]), capacity=4 * 256)
    for bucket in plan.buckets:
        assert [len(bucket.of_rank(rank).reads) for rank in range(4)] == [1] * 4


def test_buckets_hold_all_tensors_within_the_size_asked_for_and_layer_10_comes_after_9():
    tensors = {f"layers.{i}.w": ("float32", (100,)) for i in range(12)}
    held = [[Region.whole(name, *tensor) for name, tensor in tensors.items()]]
    plan = make_plan(held, one(), capacity=1000)
    assert [name for b in plan.buckets for name in b.layouts[0].entries] == list(tensors)
    assert all(b.layouts[0].used <= 1000 for b in plan.buckets) and plan.capacity <= 1000
    assert (plan.tensors, plan.bytes) == (12, 12 * 400)
    assert plan.manifest(0)[0] == ["layers.0.w", "float32", [100]]


def test_a_tensor_larger_than_the_size_asked_for_makes_the_buckets_as_large():
    layouts = lay_out({"small": ("float32", (16,)), "embedding": ("bfloat16", (4096,))}, capacity=1024)
    assert {layout.capacity for [layout] in layouts} == {8192}
    assert [list(layout.entries) for [layout] in layouts] == [["small"], ["embedding"]]


def test_a_small_model_is_still_cut_so_that_loading_and_writing_overlap():
    layouts = lay_out({f"t{i}": ("float32", (16,)) for i in range(64)}, capacity=2**29)
    assert len(layouts) == 8


def test_down_projections_of_latent_attention_share_a_bucket():
    prefix = "model.layers.0.self_attn"
    tensors = {f"{prefix}.kv_a_proj_with_mqa.weight": ("float32", (16,))}
    tensors |= {f"filler.{i}": ("float32", (16,)) for i in range(9)}
    tensors |= {f"{prefix}.q_a_proj.weight": ("float32", (16,))}
    together = [n for n in tensors if "a_proj" in n]
    layouts = lay_out(tensors, capacity=128)
    assert sum(all(n in layout.entries for n in together) for [layout] in layouts) == 1


def test_irregular_tensors_come_last_in_their_own_order():
    held = [[rows("b", 0, 8), Region.whole("a", "float32", (4,)), Region.whole("0", "float32", (4,))]]
    plan = make_plan(held, one(), capacity=10_000, last=["a", "0"])
    assert [name for b in plan.buckets for name in b.layouts[0].entries] == ["b", "a", "0"]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([[rows("w", 0, 4)], [rows("w", 5, 3)]], r"tensor w .*do not make it up: \[\(0, 4\), \(5, 8\)\]"),
        ([[rows("w", 0, 4)]], "tensor w .*do not make it up"),
        ([[rows("w", 0, 5)], [rows("w", 4, 4)]], "tensor w .*do not make it up"),
        ([[rows("w", 0, 4)], [rows("w", 4, 4, total=9)]], r"tensor w is bfloat16 \[8, 16\].*\[9, 16\]"),
    ],
)
def test_parts_that_do_not_make_up_a_tensor_are_an_error_with_its_name(held, message):
    with pytest.raises(ModelError, match=message):
        make_plan(held, one(len(held)), capacity=10_000)


@pytest.mark.parametrize(
    ("shape", "dim", "cuts", "dtype", "expected"),
    [
        ((8, 16), 0, [0, 4, 8], "bfloat16", 8),
        ((8, 3), 0, [0, 4, 8], "bfloat16", 2),
        ((8, 16), 1, [0, 8, 16], "bfloat16", 8),
        ((8, 12), 1, [0, 6, 12], "bfloat16", 4),
        ((6,), 0, [0, 3, 6], "float32", 4),
        ((8, 10), 1, [0, 5, 10], "float8_e4m3fn", 1),
        ((), 0, [0, 1], "float32", 4),
    ],
)
def test_no_word_of_a_checksum_lies_across_an_edge(shape, dim, cuts, dtype, expected):
    regions = [Region("w", dtype, shape, dim, start, end - start) for start, end in itertools.pairwise(cuts)]
    assert word_bytes(regions) == expected
    item = getattr(torch, dtype).itemsize
    if shape and dim == len(shape) - 1:
        assert all(cut * item % expected == 0 for cut in cuts)
