"""Splits of a plan's devices between engines and trainer."""

from __future__ import annotations

from io import StringIO
from pathlib import PurePosixPath

import pytest
from rich.console import Console

from megatron_pmd.config import override
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.launch.script import job_for
from megatron_pmd.planner.planning import Plan, make_plan
from megatron_pmd.planner.split import Split, balanced_split, iteration_seconds
from megatron_pmd.planner.split import split_of as split_of_recipe
from megatron_pmd.planner.table import show
from recipes import recipe


def plan_of(name: str, *settings: str) -> Plan:
    return make_plan(override(recipe(name), list(settings)), load_cluster("h100").machines)


def split_of(plan: Plan) -> Split:
    split = balanced_split(plan)
    assert split is not None
    return split


def test_each_side_takes_as_much_longer_as_it_has_fewer_devices() -> None:
    """Operations are shared out evenly, and an engine's slots are full either way."""
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    split, alone = split_of(plan), plan.cost.seconds
    trainers = split.trainer.config.layout.ranks
    assert split.engine_devices + trainers == 32
    assert split.sampling_seconds == pytest.approx(alone["rollout"] * 32 / split.engine_devices)
    assert split.training_seconds == pytest.approx((alone["anchor"] + alone["update"]) * 32 / trainers)
    assert split.sync_seconds == pytest.approx(2 * plan.shape.total / plan.assumptions.sync_bytes_per_second)


def test_no_other_split_has_a_shorter_iteration() -> None:
    """Of a node of 8 GPUs, two for each engine: 2 or 6 ranks and their engine fill it."""
    plan = plan_of("qwen2_5_7b_dapo_8xh100")
    training = plan.cost.seconds["anchor"] + plan.cost.seconds["update"]
    assert (plan.config.layout.tensor, plan.config.devices_per_engine) == (2, 2)
    sides = {
        ranks: max(plan.cost.seconds["rollout"] * 8 / (8 - ranks), training * 8 / ranks) for ranks in (4, 6)
    }
    split = split_of(plan)
    assert split.trainer.config.layout.ranks == min(sides, key=lambda ranks: sides[ranks])
    assert max(split.sampling_seconds, split.training_seconds) == pytest.approx(min(sides.values()), rel=0.01)


def printed_settings(plan: Plan) -> list[str]:
    text = StringIO()
    show(plan, Console(file=text, width=300))
    return next(line for line in text.getvalue().splitlines() if "settings" in line).split()[1:]


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        (["rollout.partial.extra_groups=32"], "rollout.partial=null"),
        (["sync.transport=disk"], "sync.transport=ipc"),
    ],
)
def test_what_a_plan_prints_of_a_split_can_be_typed_and_makes_it(settings: list[str], printed: str) -> None:
    """The split is planned without partial rollouts, and with a transport that reaches its engines."""
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100", *settings)
    typed = printed_settings(plan)
    assert printed in typed
    assert split_of_recipe(make_plan(override(plan.config, typed), plan.machines)) == split_of(plan)


def test_a_split_launches() -> None:
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    split = split_of(plan)
    job = job_for(split.trainer.config, load_cluster("h100"), PurePosixPath("/shared/x"))
    assert (job.nodes, job.ranks_per_node, job.gpus_per_node) == (4, 4, 8)
    assert (split.trainer.nodes, plan.nodes) == (4, 4), "half of each node is the engines'"
    assert split.trainer.host["other phases"]["processes"] == plan.host["other phases"]["processes"] / 2
    assert "offloaded weights" not in split.trainer.host["other phases"], "a trainer's device is its own"
    assert iteration_seconds(split.trainer) == pytest.approx(
        max(split.sampling_seconds, split.training_seconds) + split.trainer.cost.seconds["sync"]
    )


def test_a_trainer_that_does_not_fit_its_devices_is_no_split() -> None:
    """Of 128 GPUs the trainer of 235 billion parameters needs all that the recipe gives it."""
    plan = plan_of("qwen3_235b_a22b_128xh100")
    assert balanced_split(plan) is None
    text = StringIO()
    show(plan, Console(file=text, width=120))
    assert "no part of these devices" in text.getvalue()


def test_a_plan_names_the_split() -> None:
    text = StringIO()
    plan = plan_of("qwen3_30b_a3b_dapo_32xh100")
    show(plan, Console(file=text, width=120))
    assert "engines: 4 of 4 H100" in text.getvalue()
    assert "trainer: 16 H100" in text.getvalue()
    assert "layout.data=4 rollout.ranks_per_engine=4 rollout.placement=separate" in text.getvalue()
