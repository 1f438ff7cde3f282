"""What an actor leaves on the device, what comes back, and its bytes in each phase against the plan's.

The account is the allocator's: every block that is in use has a holder, found by who keeps a tensor in it.
"""

from __future__ import annotations

import pytest

from megatron_pmd.config import override
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.planning import make_plan
from tests.actor.tiny_models import config_for
from tests.gpu_emulated.conftest import asked_for
from tests.gpu_emulated.launch import launch

CASES = {
    "bf16": ("dense for fp8", []),
    "bf16 moments": ("dense for fp8", ["optimizer.moments=bf16"]),
    "the optimizer on the host": ("dense for fp8", ["optimizer.offload=1"]),
    "half of the optimizer on the host": ("dense for fp8", ["optimizer.offload=0.5"]),
    "adapters": ("dense for fp8", ["actor.lora.rank=8", "actor.lora.alpha=16"]),
    "tensorwise": ("dense for fp8", ["actor.fp8.recipe=tensorwise"]),
    "tensorwise, gathered": (
        "dense for fp8", ["actor.fp8.recipe=tensorwise", "actor.fp8.parameter_gather=true"],
    ),
    "blockwise": ("experts for fp8", ["actor.fp8.recipe=blockwise"]),
    "blockwise, gathered": (
        "latent for fp8", ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true"],
    ),
}  # fmt: skip
LEFT = {
    "get_cublas_workspace": 2**26,
    "RotaryEmbedding.inv_freq": 2**10,
    "YarnRotaryEmbedding.inv_freq": 2**10,
    "FusedAdam.dummy_overflow_buf": 4,
    "FusedAdam.scales": 2**10,
    "DistributedOptimizer.scale_one": 4,
    "RouterLosses": 4,
}
"""Who may keep something on the device while engines generate, and at most how many bytes of it."""
ALIGNMENT_BYTES = 64 * (2 + 4)
"""So much more than planned a tensor may take: in megatron-core's buffers of weights and gradients it begins
at a multiple of 64 elements (param_and_grad_buffer.py)."""


def config_of(models, case):
    model, words = CASES[case]
    return override(config_for(models / model, precision="bf16"), words)


@pytest.fixture(scope="module")
def outcomes(request, models, tmp_path_factory):
    cases = {name: config_of(models, name) for name in asked_for(request, "case", CASES)}
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch("memory_programs.round_trips", list(cases.values()), cases=cases, folder=folder)[0]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def plan(models, case):
    return make_plan(config_of(models, case), load_cluster("h100").machines)


def test_nothing_of_the_actor_is_left_on_the_device(outcomes, case):
    for away in outcomes[case]["away"]:
        assert {name: size for name, size in away.items() if size > LEFT.get(name, 0)} == {}


def test_what_comes_back_has_the_bits_that_left(outcomes, case):
    assert outcomes[case]["returned bits"] == outcomes[case]["bits"]


def test_what_comes_back_is_where_it_was(outcomes, case):
    assert outcomes[case]["returned places"] == outcomes[case]["places"]


def test_steps_with_everything_away_between_them_are_those_without_bit_for_bit(outcomes, case):
    assert outcomes[case]["steps"] == outcomes[case]["alone"]
    assert outcomes[case]["last bits"] == outcomes[case]["alone bits"]


def test_the_second_round_trip_takes_no_more_than_the_first(outcomes, case):
    (_, without_optimizer, away), again = outcomes[case]["allocated"]
    assert again[1:] == (without_optimizer, away)
    assert outcomes[case]["away"][0] == outcomes[case]["away"][1]


def test_a_checkpoint_brings_back_the_bits_that_were_saved(outcomes, case):
    assert outcomes[case]["loaded bits"] == outcomes[case]["saved bits"]
