"""What the runs of a plan are played with, and what a person is shown of them."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.planning import Plan, make_plan
from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.comparing import Play, compare, planned_lengths
from megatron_pmd.simulator.picture import COLOURS, figure
from megatron_pmd.simulator.scenario import Failures
from megatron_pmd.simulator.table import show
from recipes import recipe

PROJECT = Path(__file__).parents[2]
SMALL = ["batch.prompts_per_rollout=64", "batch.prompts_per_step=16"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(override(recipe("qwen2_5_7b_dapo_8xh100"), SMALL), load_cluster("h100").machines)


@pytest.fixture(scope="module")
def how(plan: Plan) -> Play:
    return Play(planned_lengths(plan, 1.0), 6, 1, Failures(1e-5, 60.0), [0, 1], seed=0)


@pytest.fixture(scope="module")
def runs(plan: Plan, how: Play) -> list[Played]:
    return compare(plan, how)


def test_a_colocated_run_of_mean_lengths_takes_what_the_plan_says(plan: Plan) -> None:
    """Without spread, and with whole waves of requests; the plan counts a part of a wave as that part."""
    even = override(plan.config, [f"rollout.max_running_requests={64}"])
    planned = make_plan(even, plan.machines)
    waves = even.batch.samples_per_rollout / even.engines / planned.cache.running
    assert waves == int(waves)
    how = Play(planned_lengths(planned, 0.0), 3, 0, Failures(), [], seed=0)
    played = compare(planned, how)[0]
    assert played.rollout_seconds == pytest.approx(planned.cost.iteration_seconds, rel=1e-3)


def test_a_run_without_engines_of_its_own_is_not_played(plan: Plan, how: Play) -> None:
    supervised = override(plan.config, ["algorithm.objective=sft", "batch.samples_per_prompt=1"])
    with pytest.raises(ConfigError, match="no engines of its own to be played"):
        compare(make_plan(supervised, plan.machines), how)


def test_all_runs_have_the_same_devices(runs: list[Played]) -> None:
    assert [played.scenario.mode for played in runs] == ["colocated", "partial", "overlapped", "overlapped"]
    assert {played.scenario.devices for played in runs} == {8}


def test_a_run_on_4096_devices_is_played_with_the_failures_that_so_many_have() -> None:
    """A device fails once in 1,000 hours, so one of 4,096 every quarter of an hour."""
    large = ["layout.data=128", "batch.prompts_per_rollout=512", "checkpoint.every=1"]
    plan = make_plan(override(recipe("qwen3_235b_a22b_128xh100"), large), load_cluster("h100").machines)
    failures = Failures(per_device_second=1 / (1_000 * 3600), restart_seconds=60)
    runs = compare(plan, Play(planned_lengths(plan, 1.0), 8, 1, failures, [1], seed=0))
    assert {(played.scenario.mode, played.scenario.devices) for played in runs} == {
        ("colocated", 4096), ("partial", 4096), ("overlapped", 4096),
    }  # fmt: skip
    for played in runs:
        expected = played.ends[-1] * 4096 * failures.per_device_second
        assert expected / 4 < played.failures + played.engine_failures < 4 * expected
        assert 0 < played.time_lost < 0.9


def test_the_table_has_a_column_for_each_run_and_says_what_was_assumed(runs: list[Played], how: Play) -> None:
    text = StringIO()
    show("a run", runs, how, Console(file=text, width=100))
    for words in ("2 + 6", "n=1", "log-normal", "fails every 28 hours", "1.00 x"):
        assert words in text.getvalue()


def test_the_picture_stacks_the_shares_of_each_run_to_one(runs: list[Played]) -> None:
    bars = [trace for trace in figure("a run", runs).data if trace.type == "bar"]
    assert [bar.name for bar in bars] == list(COLOURS)
    for column in zip(*(bar.y for bar in bars), strict=True):
        assert sum(column) == pytest.approx(1)


def test_the_command_writes_a_picture_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_pmd.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)"
    )
    words = [
        "simulate",
        "qwen2_5_7b_dapo_8xh100",
        *SMALL,
        "--iterations",
        "3",
        "--picture",
        str(tmp_path / "p.html"),
    ]
    made = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert "overlapped" in made.stdout
    assert "<html>" in (tmp_path / "p.html").read_text()[:1000]
