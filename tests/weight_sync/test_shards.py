"""Shards through buckets against Megatron-Bridge's own export, on four ranks: the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.fp8 import quantized
from megatron_pmd.weight_sync.bucket_layout import word_sum
from megatron_pmd.weight_sync.plan import expert_of
from tests.actor.launch import launch
from tests.actor.tiny_models import config_for, write_model
from tools.sync_plan import held_by_ranks

pytestmark = pytest.mark.slow

BUCKET_BYTES = 200_000
WIDE = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=256)
"""Two blocks of FP8 and more."""
CASES: dict[str, dict[str, Any]] = {
    "experts over EP2 TP2, one node": dict(
        family="qwen3moe",
        layout=dict(tensor=2, expert=2, data=2),
        # a tensor-parallel rank has half a block of each key and value
        fp8_family="qwen3moe",
        fp8_settings=dict(head_dim=64, num_key_value_heads=2),
    ),
    # biases, tied embeddings, and each pipeline stage on a node of its own
    "dense over TP2 PP2, two nodes, bf16": dict(
        family="qwen2",
        layout=dict(tensor=2, pipeline=2),
        nodes=2,
        precision="bf16",
        fp8_family="deepseek",
        fp8_settings={},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    case = dict(CASES[request.param])
    folder, family = tmp_path_factory.mktemp("export"), case.pop("family")
    write_model(folder / family, family)
    write_model(folder / "wide", case.pop("fp8_family"), **WIDE, **case.pop("fp8_settings"))
    found = launch(
        "export", ranks=4, module="tests.weight_sync.push_programs", path=folder / family,
        fp8_path=folder / "wide", bucket_bytes=BUCKET_BYTES, key=f"test-{folder.name}", **case,
    )  # fmt: skip
    for rank in found:
        rank["folders"] = {"regions": folder / family, "plain regions": folder / "wide"}
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("when", ["first", "second"])
def test_every_node_gets_the_tensors_of_the_bridges_export_bit_for_bit(ranks, when):
    """`second`: after all weights have changed, through the same buckets."""
    receivers = [rank for rank in ranks if rank["records"]]
    assert {rank["node"] for rank in receivers} == {rank["node"] for rank in ranks}
    for rank in receivers:
        bridge, pushed = rank[when]
        assert len(bridge) > 40 and same(pushed, bridge)
    assert not same(receivers[0]["first"][1], receivers[0]["second"][1])


def test_no_parameter_of_these_families_needs_the_bridges_communication(ranks):
    assert all(rank["irregular"] == 0 for rank in ranks)


def test_tensors_that_only_the_bridge_can_make_arrive_too(ranks):
    for rank in ranks:
        if rank["records"]:
            assert same(rank["all irregular"], rank["second"][0])


def test_buckets_on_the_ranks_own_devices_hold_the_same_on_each(ranks):
    """As on GPUs, but for the handles: what other ranks hold comes in messages."""
    for rank in ranks:
        if rank["records"]:
            assert same(rank["on devices"]["tensors"], rank["second"][0])


def test_a_device_bucket_is_opened_once_an_update_even_after_one_that_failed_and_then_given_back(ranks):
    for rank in ranks:
        seen = rank["on devices"]
        assert len(seen["kept"]) == (2 if rank["records"] else 0) and seen["left"] == 0
        if rank["records"]:
            assert len(seen["opened"]) == len(set(seen["opened"])) == 2
            assert seen["ends"] == [False] * (len(seen["ends"]) - 1) + [True]


def test_each_rank_of_an_engine_gets_its_experts_and_all_else_and_is_told_the_sums(ranks):
    """Two engines of two ranks, which divide the experts, on devices: messages between all four ranks."""
    whole = next(rank["second"][0] for rank in ranks if rank["records"])
    experts = 1 + max((n for n in map(expert_of, whole) if n is not None), default=-1)
    for number, rank in enumerate(ranks):
        seen = rank["of the ranks' own engines"]
        expected = {
            name: tensor
            for name, tensor in whole.items()
            if (expert := expert_of(name)) is None or 2 * expert // experts == number % 2
        }
        assert (len(expected) < len(whole)) == (experts > 0)
        assert same(seen["tensors"], expected)
        for bucket in ranks[number - number % 2]["of the ranks' own engines"]["told"]:
            told = bucket[number % 2]
            for (name, *_), (word, total) in zip(told["tensors"], told["sums"], strict=True):
                assert int(word_sum(whole[name], word)) == total
        manifest = ranks[number - number % 2]["of the ranks' own engines"]["told"][-1][number % 2]["update"]
        assert {name for name, *_ in manifest["manifest"]} == expected.keys()


def test_two_senders_to_an_engine_elsewhere_have_and_send_half_of_the_experts_each_and_all_tensors_once(
    ranks,
):
    whole = next(rank["second"][0] for rank in ranks if rank["records"])
    experts = {name for name in whole if expert_of(name) is not None}
    for number, rank in enumerate(ranks):
        seen = rank["for engines elsewhere"]
        sent = [[name for told in seen["told"] for name, *_ in told[share]["tensors"]] for share in (0, 1)]
        assert sorted(sent[0] + sent[1]) == sorted(whole)
        assert set(sent[1]) <= experts and 2 * len(sent[1]) == len(experts)
        own = set(sent[number % 2]) | whole.keys() - experts
        assert same(seen["tensors"], {name: whole[name] for name in own})


def test_the_count_for_recipes_knows_what_a_rank_really_holds(ranks, request):
    """tools/sync_plan.py, which needs no ranks, against Megatron's own layout of two mixtures of experts."""
    case = CASES[request.node.callspec.params["ranks"]]
    for family, key in ((case["family"], "regions"), (case["fp8_family"], "plain regions")):
        if family not in ("qwen3moe", "deepseek"):
            continue
        folder = ranks[0]["folders"][key]
        run = config_for(
            folder, case["layout"], precision=case.get("precision", "fp32") if key == "regions" else "fp32"
        )
        counted = held_by_ranks(run, json.loads((folder / "config.json").read_text()))
        for rank, regions in zip(ranks, counted, strict=True):
            real = rank["regions"] if key == "regions" else rank["fp8"]["plain regions"]
            assert set(real) == set(regions)


def test_blockwise_fp8_is_that_of_the_whole_tensors_bit_for_bit(ranks):
    for rank in ranks:
        seen = rank["fp8"]
        assert seen["own"] and seen["irregular"] > 0, "both ways have to be there"
        if rank["records"]:
            expected = dict(quantized(seen["bridge"].items()))
            assert any(name.endswith("_scale_inv") for name in expected)
            assert same(
                {name: _bits(tensor) for name, tensor in seen["pushed"].items()},
                {name: _bits(tensor) for name, tensor in expected.items()},
            )


def test_what_a_node_holds_is_quantised_once_there_however_many_nodes_want_it(ranks):
    held = {(rank["node"], region) for rank in ranks for region in rank["fp8"]["own"]}
    assert sum(rank["fp8"]["quantised"] for rank in ranks) == sum(region.nbytes for _, region in held), (
        "one byte a value"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: torch does not compare it."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def test_the_extra_memory_is_two_buckets_a_node_and_less_than_one_to_cross_nodes(ranks):
    for rank in ranks:
        sizes = list(rank["files"].values())
        assert len(sizes) == 2 and max(sizes) <= BUCKET_BYTES
        if not rank["records"]:  # a recording rank keeps a copy of everything
            assert rank["grew"] < max(sizes), rank["grew"]


def test_ranks_gather_each_others_objects_twice_an_update_however_many_buckets_it_has(ranks):
    """To begin and to confirm. At 512 ranks a gathering takes longer than a bucket."""
    assert all(rank["report"][2] > 2 and rank["gathers"] == 2 for rank in ranks)


def test_count_bytes_and_names_go_with_the_last_bucket(ranks):
    receiver = next(rank for rank in ranks if rank["records"])
    tensors = receiver["second"][0]
    count, total, buckets = receiver["report"]
    assert (count, total) == (len(tensors), sum(t.nbytes for t in tensors.values())) and buckets > 2
    assert receiver["positions"] == [False] * (buckets - 1) + [True]
    assert {name: tuple(shape) for name, _, shape in receiver["manifest"]} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_a_bucket_that_one_engine_refuses_is_raised_on_all_ranks_and_no_version_follows(ranks):
    for rank in ranks:
        assert rank["refused"] == "engine 7 refused the weights"
        assert rank["calls"] == ["begin", 1, "begin", 2, "begin"]


def test_the_buckets_are_gone_afterwards(ranks):
    names = [name for rank in ranks for name in rank["files"]]
    assert names and not any(Path("/dev/shm", name).exists() for name in names)
