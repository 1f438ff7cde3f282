"""The planner's save against arithmetic by hand, and against the bytes that a real save copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.config import override
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.hardware import H100, Machines
from megatron_pmd.planner.planning import Plan, make_plan
from megatron_pmd.planner.saving import save_of
from recipes import recipe
from recipes.tiny_moe_cpu import make_model
from tests.actor.launch import launch

EXPERTS_30B = 48 * 128 * 3 * 2048 * 768 // 8
"""Parameters of routed experts on a rank of the recipe: 48 layers of 128 experts, shared out by 8 ranks."""


def plan_of(name: str, *settings: str, host_bytes: float = 2e12) -> Plan:
    return make_plan(override(recipe(name), list(settings)), Machines(H100, 8, int(host_bytes), 2e9))


def test_each_rank_of_the_30b_recipe_gathers_the_states_of_its_whole_part_of_the_model() -> None:
    """12 bytes for each of its parameters, though the 4 ranks with the same experts share the states."""
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    (stage,) = plan.stages
    assert stage.experts == EXPERTS_30B and stage.expert_shards == 4
    assert plan.host["save"]["gathered states"] == 8 * 12 * (stage.dense + EXPERTS_30B)
    assert plan.host["save"]["gathered states"] / 8 == pytest.approx(48.2e9, rel=1e-3)
    # written by the node: the quarter of the experts' states and the eighth of the dense ones of each rank,
    # in fp32, and the same parts of the bf16 weights
    written = 8 * (12 + 2) * (stage.dense / 8 + EXPERTS_30B / 4)
    assert plan.host["other phases"]["checkpoint being written"] == pytest.approx(written)
    assert plan.host["save"]["copies of gathered states"] == pytest.approx(written)


def test_a_bucket_at_a_time_comes_to_the_device_twice_without_a_pipeline() -> None:
    """40 million parameters and the largest, 151,936 x 2,048 over 4 ranks, in fp32; and a rank's quarter.

    Twice: torch gathers it in one piece and copies that into the ranks' pieces (tests/gpu_emulated).
    """
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    bucket = 40e6 + 151_936 * 2048 / 4
    assert plan.phases["save"]["gathered states"] == pytest.approx(4 * bucket * 2.25)


def test_parameters_held_in_fp8_and_the_others_are_gathered_one_after_the_other() -> None:
    """Of four layers: 8 experts of 3 x 128 x 256, and q, k, v and o of 128 x (4 + 2 + 2 + 4) heads of 32.

    Beside them embeddings, norms and routers, which are fewer. 4 bytes, twice and the only rank's share.
    """
    words = ["layout.data=1", "layout.expert=1", "rollout.ranks_per_engine=1", "model.precision=bf16"]
    fp8 = [*words, "actor.fp8.recipe=tensorwise"]
    (stage,) = plan_of("tiny_moe_cpu", *fp8).stages
    in_fp8 = 4 * (8 * 3 * 128 * 256 + 128 * 12 * 32)
    gathered = plan_of("tiny_moe_cpu", *fp8, "actor.fp8.parameter_gather=true")
    assert gathered.phases["save"]["gathered states"] == 12 * in_fp8
    assert plan_of("tiny_moe_cpu", *fp8).phases["save"]["gathered states"] == 12 * stage.parameters


def test_behind_a_pipelines_first_stage_the_hosts_gather_what_would_overflow_the_device() -> None:
    """The fullest stage of DeepSeek-V3 has its experts' states on one rank each: gathering them on the device
    would take the whole twice, and the rank's share, which is the whole, 4 bytes a parameter each."""
    plan = plan_of("deepseek_v3_256xh100")
    stage = max(plan.stages, key=lambda stage: stage.parameters)
    assert stage.expert_shards == 1
    on_the_device = 4 * 3 * stage.experts
    assert on_the_device == pytest.approx(33.7e9, rel=0.01)
    assert sum(plan.phases["save"].values()) + on_the_device > 0.95 * H100.memory_bytes
    assert plan.phases["save"]["gathered states"] == 0
    assert plan.problems == []


def test_a_save_that_the_hosts_cannot_hold_is_refused_although_training_fits() -> None:
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100", host_bytes=600e9)
    assert sum(plan.host["other phases"].values()) < 0.95 * 600e9
    (problem,) = plan.problems
    assert problem.startswith("save: 71") and "GB of a node's host memory needed, 570.0 GB to give" in problem
    assert "gathered states 385.8 GB" in problem


def test_the_stall_is_the_bytes_copied_over_the_rate_that_is_assumed() -> None:
    """By rank: four times all states of its part, three times those of its share, and its share's weights."""
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    (stage,) = plan.stages
    share = stage.dense / 8 + EXPERTS_30B / 4
    copied = 4 * 12 * (stage.dense + EXPERTS_30B) + 3 * 12 * share + 2 * share
    assert plan.cost.seconds["save"] == pytest.approx(copied / 4 / 1e9)
    assert plan.cost.seconds["write"] == pytest.approx(plan.checkpoint_bytes / 4 / 2e9)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_save_copies_as_many_bytes_as_planned(ranks: int, tmp_path: Path) -> None:
    """Within what megatron-core pads buffers by, and small change: the digest's sums, the random states."""
    folder = tmp_path / "tiny-moe"
    make_model(folder)
    layout = [f"layout.expert={ranks}", f"layout.data={ranks}", "rollout.ranks_per_engine=1"]
    settings = [f"model.path={folder}", *layout]
    found = launch(
        "copied_bytes", ranks=ranks, module="tests.planner.measured_save", settings=settings, folder=tmp_path
    )
    config = override(recipe("tiny_moe_cpu"), settings)
    machines = load_cluster("lab").machines
    plan = make_plan(config, machines)
    (stage,) = plan.stages
    planned = save_of(plan.shape, config, stage, machines, plan.assumptions).copied_bytes
    assert sum(found) / ranks == pytest.approx(planned, rel=1e-3)
