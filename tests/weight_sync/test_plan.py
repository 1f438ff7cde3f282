"""Who writes what into which bucket, without any rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.plan import Region, lay_out, make_plan, word_bytes


def rows(name: str, start: int, length: int, total: int = 8) -> Region:
    return Region(name, "bfloat16", (total, 16), 0, start, length)


def halves(*names: str) -> list[list[Region]]:
    """Two tensor-parallel ranks, each with half of every tensor."""
    return [[rows(name, start, 4) for name in names] for start in (0, 4)]


def test_every_region_is_written_once_on_every_node_that_needs_it():
    held = halves("a", "b", "c") * 2  # two replicas, one a node
    plan = make_plan(held, [0, 0, 1, 1], targets=[0, 1], capacity=10_000)
    for node in (0, 1):
        written = [r for b in plan.buckets for rank in (2 * node, 2 * node + 1) for r in b.writes[rank]]
        assert sorted((r.name, r.start) for r in written) == [(n, s) for n in "abc" for s in (0, 4)]
    assert not any(bucket.moves for bucket in plan.buckets)


def test_replicas_on_a_node_share_the_writing():
    held = [[Region.whole(f"t{i}", "float32", (64,)) for i in range(8)] for _ in range(4)]
    plan = make_plan(held, [0] * 4, targets=[0], capacity=10_000)
    assert [sum(len(b.writes[rank]) for b in plan.buckets) for rank in range(4)] == [2] * 4


def test_what_only_another_node_holds_is_moved_to_one_rank_there():
    """Two pipeline stages, a node each."""
    held = [*halves("a"), *halves("b")]
    plan = make_plan(held, [0, 0, 1, 1], targets=[0, 1], capacity=10_000)
    moves = [(m.region.name, m.region.start, m.source, m.target) for b in plan.buckets for m in b.moves]
    assert {(name, start, source) for name, start, source, _ in moves} == {
        ("a", 0, 0), ("a", 4, 1), ("b", 0, 2), ("b", 4, 3),
    }  # fmt: skip
    assert all((target >= 2) == (name == "a") for name, _, _, target in moves)
    assert {target for _, _, _, target in moves} == {0, 1, 2, 3}


def test_a_node_without_engines_gets_nothing_but_sends_what_it_holds():
    plan = make_plan([*halves("a"), *halves("b")], [0, 0, 1, 1], targets=[1], capacity=10_000)
    assert all(not b.writes[0] and not b.writes[1] for b in plan.buckets)
    assert {(m.region.name, m.source) for b in plan.buckets for m in b.moves} == {("a", 0), ("a", 1)}


def test_buckets_hold_all_tensors_within_the_size_asked_for_and_layer_10_comes_after_9():
    tensors = {f"layers.{i}.w": ("float32", (100,)) for i in range(12)}
    held = [[Region.whole(name, *tensor) for name, tensor in tensors.items()]]
    plan = make_plan(held, [0], targets=[0], capacity=1000)
    assert [name for b in plan.buckets for name in b.layout.entries] == list(tensors)
    assert all(b.layout.used <= 1000 for b in plan.buckets) and plan.capacity <= 1000
    assert (plan.tensors, plan.bytes) == (12, 12 * 400)
    assert plan.manifest[0] == ["layers.0.w", "float32", [100]]


def test_a_tensor_larger_than_the_size_asked_for_makes_the_buckets_as_large():
    layouts = lay_out({"small": ("float32", (16,)), "embedding": ("bfloat16", (4096,))}, capacity=1024)
    assert {layout.capacity for layout in layouts} == {8192}
    assert [list(layout.entries) for layout in layouts] == [["small"], ["embedding"]]


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
    assert sum(all(n in layout.entries for n in together) for layout in layouts) == 1


def test_irregular_tensors_come_last_in_their_own_order():
    held = [[rows("b", 0, 8), Region.whole("a", "float32", (4,)), Region.whole("0", "float32", (4,))]]
    plan = make_plan(held, [0], targets=[0], capacity=10_000, last=["a", "0"])
    assert [name for b in plan.buckets for name in b.layout.entries] == ["b", "a", "0"]


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
        make_plan(held, [0] * len(held), targets=[0], capacity=10_000)


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
