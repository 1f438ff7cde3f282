"""A weight update through CUDA IPC handles, into our loader in another process on the same device."""

from __future__ import annotations

import pytest
import torch

from megatron_pmd.config import override
from megatron_pmd.fp8 import LARGEST, SCALE_SUFFIX, dequantize, is_quantized
from tests.actor.tiny_models import config_for
from tests.gpu_emulated.conftest import asked_for
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.sync_programs import FAULTS

GATHERED = ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true"]
MODELS = ("dense for fp8", "experts for fp8", "latent for fp8")
CASES = {
    f"{model}, {kind}": (model, words, fp8)
    for model in MODELS
    for kind, (words, fp8) in {
        "bf16": ([], False),
        "gathered, to bf16 engines": (GATHERED, False),
        "gathered, to fp8 engines": (GATHERED, True),
    }.items()
}
"""The model, its settings, and whether its matrices leave in FP8."""
TWO_RANKS = {
    "dense, tensor=2": ("dense for fp8", dict(tensor=2), False),
    "experts, expert=2 data=2": ("experts for fp8", dict(expert=2, data=2), False),
    "experts, expert=2 data=2, to fp8 engines": ("experts for fp8", dict(expert=2, data=2), True),
}


def config(models, model, words, layout=None):
    return override(config_for(models / model, layout, precision="bf16"), words)


@pytest.fixture(scope="module")
def one_rank(request, models):
    asked = asked_for(request, "case", CASES)
    cases = {name: (config(models, model, words), fp8) for name, (model, words, fp8) in asked.items()}
    return launch("sync_programs.updates", cases=cases, together=False)[0]


@pytest.fixture(scope="module")
def two_ranks(request, models):
    """Of rank 0, which leads the engine."""
    cases = {
        name: (config(models, model, GATHERED if fp8 else [], layout), fp8)
        for name, (model, layout, fp8) in asked_for(request, "layout", TWO_RANKS).items()
    }
    return launch("sync_programs.updates", ranks=2, cases=cases, together=True)[0]


@pytest.fixture(scope="module")
def faulty(models):
    given = config(models, "dense for fp8", [])
    return launch("sync_programs.faults", config=given)[0]


FUSED = tuple(f"self_attn.{kind}_proj.weight" for kind in "qkv")


def assert_is_the_export(received, export, *, fp8):
    """Bit for bit; in FP8 the numbers that the blocks stand for are those of the parameter, in its dtype.

    The blocks of a fused projection of 128 rows hold queries, keys and values: of these new blocks are made.
    """
    whole = dict(received)
    for name in [name for name in export if fp8 and is_quantized(name)]:
        assert whole[name].dtype is torch.float8_e4m3fn
        whole[name] = dequantize(whole[name], whole.pop(name + SCALE_SUFFIX)).to(export[name].dtype)
    assert whole.keys() == export.keys()
    wrong = [name for name, tensor in export.items() if not torch.equal(whole[name], tensor)]
    assert [name for name in wrong if not fp8 or not name.endswith(FUSED)] == []
    for name in wrong:
        block = export[name].abs().max() / LARGEST
        torch.testing.assert_close(whole[name], export[name], rtol=2.0**-4, atol=float(block * 2.0**-9))


@pytest.mark.parametrize("case", CASES)
def test_an_engine_on_the_device_gets_the_export_bit_for_bit(one_rank, case):
    [received] = one_rank[case]["received"]
    assert_is_the_export(received, one_rank[case]["export"], fp8=CASES[case][2])
    assert one_rank[case]["buckets"] > 2


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_an_update_is_left_on_the_device(one_rank, case):
    assert one_rank[case]["left"] == 0


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_an_engine_of_two_ranks_gets_the_weights_of_two_actor_ranks_each_on_its_own_device(two_ranks, layout):
    """Of the experts each rank gets its half; the rest is whole on both."""
    received, export = two_ranks[layout]["received"], two_ranks[layout]["export"]
    for rank, tensors in enumerate(received):
        own = {
            name: tensor
            for name, tensor in export.items()
            if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) // 2 == rank
        }
        assert_is_the_export(tensors, own, fp8=TWO_RANKS[layout][2])
    assert two_ranks[layout]["left"] == 0


def test_a_handle_whose_process_was_killed_is_refused_by_the_buckets_name(faulty):
    assert "weight bucket gone#1: its CUDA IPC handle does not open" in faulty["sender died"]


def test_a_byte_that_changes_on_the_device_is_refused_by_the_tensors_name(faulty):
    said = faulty[FAULTS[0]]["said"]
    assert "rank 0 refused the weights: BucketError: weight bucket emulated-0-1#" in said
    assert "has not the checksum it was sent with" in said


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_an_engine_that_is_killed_in_an_update_ends_it_by_name(faulty, fault):
    assert faulty[fault]["said"] == "rank 0 of the engine ended with -9"


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_failed_update_the_next_one_is_whole_and_leaves_nothing(faulty, fault):
    assert_is_the_export(faulty[fault]["received"], faulty["export"], fp8=False)
    assert faulty[fault]["left"] == 0
