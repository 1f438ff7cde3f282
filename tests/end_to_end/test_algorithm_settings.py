"""The settings of the mathematics, seen from a run's own records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_pmd.rollout_file import read_rollout, write_rollout
from tests.end_to_end.command_line import CommandLine
from tests.end_to_end.rewards import share_of_letters

pytestmark = pytest.mark.slow

SUPERVISED = [
    "algorithm.objective=sft", "actor.experts.replay_routing=false", "warm_start=null",
    "batch.samples_per_prompt=1", "batch.prompts_per_rollout=64", "batch.prompts_per_step=32",
    "optimizer.learning_rate=2e-3",
]  # fmt: skip
OTHERWISE = [
    "algorithm.objective=grpo", "algorithm.objective.divide_by_deviation=true",
    "algorithm.mismatch.weight=token_tis", "algorithm.ptx.weight=0.5", "algorithm.ptx.examples_per_step=6",
    "algorithm.ptx.source.kind=reasoning_gym", "algorithm.ptx.source.task=spell_backward",
    "algorithm.ptx.source.size=20", "optimizer.reset_every_iteration=true",
    "actor.experts.replay_routing=false",
]  # fmt: skip
STOP = ["alarms.entropy_collapse.threshold=2", "alarms.entropy_collapse.action=stop"]
SCHEDULED = [
    "iterations=2", "algorithm.anchor=engine", "data.sampling=prioritised", "data.evaluation=null",
    "algorithm.tau_schedule.end=0.4", "algorithm.tau_schedule.iterations=1",
    "rollout.temperature_schedule.end=0.6", "rollout.temperature_schedule.iterations=1",
    "reward.length.weight=0.25", "reward.length.warmup_iterations=1", "reward.truncation_penalty=0.125",
]  # fmt: skip


def test_supervised_training_needs_no_engines_and_lowers_its_loss(command_line: CommandLine) -> None:
    command_line.run("supervised", *SUPERVISED)
    losses = [step["loss"] for step in command_line.steps("supervised")]
    # the first loss is that of a random model over 128 tokens: ln 128 nats
    assert losses[0] == pytest.approx(math.log(128), abs=0.3)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    assert list(command_line.path("supervised").glob("logs/engine*")) == []
    assert (command_line.path("supervised") / "hf" / "iteration-3" / "model.safetensors").is_file()


def test_another_objective_trains_on_the_same_rollout_with_examples_beside(
    live: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    """The first rollout of the live run, half of each group called right; of the others only half counts.

    At the first step π_θ is π_t, so that s = 0 and ρ = 1: what is left of the losses is arithmetic in the
    advantages A and the counted tokens n, A²/(2τn) of PMD and −A of GRPO, each with its own mean.
    """
    samples, _ = read_rollout(live / "rollouts" / "0.parquet")
    for sample in samples:
        sample.reward = float(sample.number % 2)
        [whole] = sample.segments
        if not sample.reward:
            half = (whole.tokens + 1) // 2
            sample.segments = [
                replace(whole, tokens=half),
                replace(whole, tokens=whole.tokens - half, counted=False),
            ]
    write_rollout(tmp_path / "0.parquet", samples, 0)
    words = ["--replay", str(tmp_path / "0.parquet"), "iterations=1"]
    command_line.run("pmd_beside", *words)
    command_line.run("grpo_beside", *words, *OTHERWISE)
    pmd, grpo = command_line.steps("pmd_beside"), command_line.steps("grpo_beside")
    assert len(pmd) == len(grpo) == 2
    first = samples[:16]  # four prompts with four responses each
    counted = np.array([s.segments[0].tokens for s in first], np.float64)
    advantage = np.array([s.reward for s in first]) - 0.5
    assert pmd[0]["loss"] == pytest.approx(np.mean(advantage**2 / (2 * 0.1) / counted), rel=1e-5)
    deviation = math.sqrt(1 / 3)  # of 0, 1, 0, 1, with n − 1
    expected = -np.sum(advantage / deviation * counted) / counted.sum()
    # the mismatch weights are 1 but for the numerics of engine and actor
    assert grpo[0]["loss"] == pytest.approx(expected, rel=1e-3) and expected < -0.1
    for step, other in zip(grpo, pmd, strict=True):
        assert 0 < step["ptx/loss"] < math.log(128) + 1 and "ptx/loss" not in other
        assert 0 < step["entropy"] < math.log(128)


def test_an_alarm_stops_the_run_with_a_checkpoint_that_goes_on_as_if_nothing_had_happened(
    live: Path, command_line: CommandLine
) -> None:
    words = ["--replay", str(live / "rollouts"), "checkpoint.every=10"]
    output = command_line.run("alarmed", *words, *STOP, expect=3)
    assert "alarm entropy_collapse in iteration 1" in output
    summary = command_line.summary("alarmed")
    assert summary["status"] == "alarmed" and "entropy_collapse" in summary["reason"]
    assert (command_line.path("alarmed") / "checkpoints" / "iteration-2").is_dir()
    output = command_line.run("alarmed", *words)
    assert "resuming after 2 iterations" in output
    assert command_line.steps("alarmed") == command_line.steps("live")
    assert command_line.summary("alarmed")["status"] == "complete"


@pytest.fixture(scope="module")
def scheduled(command_line: CommandLine) -> Path:
    command_line.run("scheduled", *SCHEDULED)
    return command_line.path("scheduled")


def test_engines_and_actor_agree_at_a_temperature_that_changes(
    scheduled: Path, command_line: CommandLine
) -> None:
    lines = [m for m in command_line.lines("scheduled", "metrics.jsonl") if m["kind"] == "iteration"]
    assert len(lines) == 2
    for line in lines:
        assert 0 < line["sync/max_abs_difference"] <= 1e-3
    # sharper logits: half the temperature cannot leave the entropy where it was; how far it falls depends on
    # what was sampled (to 0.7 to 0.82 of it, seen)
    assert lines[1]["entropy"] < 0.9 * lines[0]["entropy"]


def test_length_and_truncation_enter_the_advantage_but_not_the_reward(scheduled: Path) -> None:
    """From the second iteration on; PMD-mean: the advantage is the shaped reward less its group's mean."""
    first, _ = read_rollout(scheduled / "rollouts" / "0.parquet")
    second, _ = read_rollout(scheduled / "rollouts" / "1.parquet")
    for sample in first:
        cut = sample.finish_reason == "length"
        assert sample.shaped_reward == pytest.approx(sample.reward - 0.125 * cut)
    assert any(
        s.shaped_reward != pytest.approx(s.reward - 0.125 * (s.finish_reason == "length")) for s in second
    )
    for samples in (first, second):
        for group in range(8):
            own = [s for s in samples if s.group == group]
            mean = np.mean([s.shaped_reward for s in own])
            assert [s.advantage for s in own] == pytest.approx([s.shaped_reward - mean for s in own])
            assert [s.reward for s in own] == [share_of_letters(s.response, s.answer) for s in own]
