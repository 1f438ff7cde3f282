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
DEVICE_BYTES = 2**32
LEFT = {
    "get_cublas_workspace": 5 * (2**25 + 2**10),  # one, and one for each stream of grouped products
    "DistributedDataParallel.params_with_grad": 2**10,  # scales of parameters that are held in FP8
    "RotaryEmbedding.inv_freq": 2**10,
    "YarnRotaryEmbedding.inv_freq": 2**10,
    "YarnRotaryEmbedding.inv_freq_extra": 2**10,
    "YarnRotaryEmbedding.inv_freq_inter": 2**10,
    "YarnRotaryEmbedding.buffers": 2**17,
    "TopKRouter.buffers": 2**10,
    # of the last row that was dispatched
    "MoEAlltoAllTokenDispatcher.probs": 2**16,
    "MoEAlltoAllTokenDispatcher.routing_map": 2**16,
    "MoEAlltoAllTokenDispatcher.reversed_local_input_permutation_mapping": 2**17,
    "MoEAlltoAllTokenDispatcher.num_global_tokens_per_local_expert": 2**10,
    "MoEAlltoAllTokenDispatcher.restore_output_by_local_experts": 2**10,
    "FusedAdam.dummy_overflow_buf": 4,
    "FusedAdam.scales": 2**10,
    "DistributedOptimizer.scale_one": 4,
    "RouterLosses.factor": 4,
}
"""Who may keep something on the device while engines generate, and at most how many bytes of it."""
SCALES_BYTES = 64
"""Of a matrix in FP8: a scale for each of its few blocks, in rows of four, by row and by column."""
BLOCK_SCALES_BYTES = 4096
"""Of all matrices in FP8 blocks, which are no part of megatron-core's buffers, and of single numbers."""
ALIGNMENT_BYTES = 64 * (2 + 4)
"""So much more than planned a tensor may take: in megatron-core's buffers of weights and gradients it begins
at a multiple of 64 elements (param_and_grad_buffer.py)."""


def config_of(models, case):
    model, words = CASES[case]
    return override(config_for(models / model, precision="bf16"), words)


@pytest.fixture(scope="module")
def outcomes(request, models, tmp_path_factory):
    cases = {name: config_of(models, name) for name in asked_for(request, "case", CASES) or ["bf16"]}
    folder = tmp_path_factory.mktemp("checkpoints")
    # what a test can fill: an allocation is an address range of the process
    environment = {"EMULATED_CUDA_BYTES": str(DEVICE_BYTES)}
    return launch("memory_programs.round_trips", environment=environment, cases=cases, folder=folder)[0]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def plan(models, case):
    return make_plan(config_of(models, case), load_cluster("h100").machines)


def test_nothing_of_the_actor_is_left_on_the_device(outcomes, case):
    for away in outcomes[case]["away"]:
        more = {name: size for name, size in away.items() if size > LEFT.get(name, 0)}
        assert sum(more.values()) <= (BLOCK_SCALES_BYTES if case.startswith("blockwise") else 0), more


def test_what_comes_back_has_the_bits_that_left(outcomes, case):
    assert outcomes[case]["returned bits"] == outcomes[case]["bits"]


def test_what_comes_back_is_where_it_was(outcomes, case):
    assert outcomes[case]["returned places"] == outcomes[case]["places"]


@pytest.mark.parametrize("case", [case for case in CASES if case != "adapters"])  # they begin at random
def test_steps_with_everything_away_between_them_are_those_without_bit_for_bit(outcomes, case):
    assert outcomes[case]["steps"] == outcomes[case]["alone"]
    assert outcomes[case]["last bits"] == outcomes[case]["alone bits"]


def test_the_second_round_trip_leaves_no_more_than_the_first(outcomes, case):
    (_, _, first), (_, _, second) = outcomes[case]["allocated"]
    assert first == second
    assert outcomes[case]["away"][0] == outcomes[case]["away"][1]


def test_a_checkpoint_brings_back_the_bits_that_were_saved(outcomes, case):
    assert outcomes[case]["loaded bits"] == outcomes[case]["saved bits"]


def tensors_of_the_model(outcome):
    return sum(not name.startswith(("main ", "exp_avg", "master_")) for name in outcome["bits"])


def test_what_leaves_has_the_planned_bytes(outcomes, case, plan):
    """Weights, gradients, the device's share of the optimizer, and FP8 copies; what stays is none of them."""
    [stage] = plan.stages
    planned = stage.weight_bytes + stage.gradient_bytes + stage.fp8_copies_bytes
    planned += stage.optimizer_bytes * (1 - plan.config.optimizer.offload)
    moved = sum(outcomes[case]["resident"].values()) - sum(outcomes[case]["away"][0].values())
    tolerance = tensors_of_the_model(outcomes[case]) * (ALIGNMENT_BYTES + SCALES_BYTES * bool(stage.in_fp8))
    if plan.config.optimizer.offload % 1:
        tolerance += plan.shape.embedding * stage.optimizer_bytes_each  # it is shared out by whole tensors
    assert abs(moved - planned) <= tolerance


def test_an_update_adds_the_planned_activations(outcomes, case, plan):
    """Within a quarter, in FP8 0.4: rows have less than max_tokens_per_microbatch, and the plan counts
    neither what Transformer Engine keeps of attention and norms, nor that FP8 keeps inputs twice.

    The second update: the first one makes the optimizer's moments. It makes the FP8 copies anew.
    """
    [stage] = plan.stages
    activations = outcomes[case]["phases"]["update"]["added"] - stage.fp8_copies_bytes
    assert activations == pytest.approx(
        plan.phases["update"]["activations"], rel=0.4 if stage.in_fp8 else 0.25
    )


def assert_gathers_as_planned(added, plan, tensors):
    """But for what a buffer is padded by: 12 bytes for each of at most 64 elements a tensor."""
    planned = plan.phases["save"]["gathered states"]
    assert planned <= added <= planned + tensors * 64 * 12


def test_a_save_adds_the_planned_gathered_states(outcomes, case, plan):
    """Of the larger buffer where parameters are held in FP8. Experts are in the dense parameters' buffer,
    because no ranks share them out."""
    assert_gathers_as_planned(
        outcomes[case]["phases"]["save"]["added"], plan, tensors_of_the_model(outcomes[case])
    )


@pytest.mark.long
def test_a_save_gathers_dense_parameters_and_then_experts(models, tmp_path):
    """Each rank has half of the experts, whole: 4.7 MB, and half of the dense parameters' states: 2.3 MB.

    Both at one time would be more than the padding allows.
    """
    config = config_for(models / "experts for fp8", dict(expert=2, data=2), precision="bf16")
    plan = make_plan(config, load_cluster("h100").machines)
    for added, tensors in launch("memory_programs.save_peak", ranks=2, config=config, folder=tmp_path):
        assert_gathers_as_planned(added, plan, tensors)


@pytest.mark.parametrize(("phase", "planned"), [("anchor", "update"), ("sync", "sync")])
def test_an_anchor_and_a_sync_add_less_than_is_planned(outcomes, case, plan, phase, planned):
    owner = {"update": "activations", "sync": "buckets"}[planned]
    assert outcomes[case]["phases"][phase]["added"] <= plan.phases[planned][owner]


@pytest.mark.parametrize("phase", ["anchor", "update", "save", "sync"])
def test_the_allocator_s_peak_is_the_device_s(outcomes, case, phase):
    """Nothing comes to the device beside torch's allocator."""
    peak = outcomes[case]["phases"][phase]
    assert peak["device"] == peak["reserved"]


@pytest.mark.parametrize("phase", ["anchor", "update"])
def test_a_phase_that_needs_more_than_the_device_has_ends_by_name(outcomes, phase):
    error, reason = outcomes["out of memory"][phase]
    assert error == "DeviceFull"
    assert reason.startswith(f"{phase}: of the 4.3 GB of cuda:0, ")
    assert "lower batch.max_tokens_per_microbatch" in reason
    assert "torch said: CUDA out of memory. Tried to allocate" in reason
