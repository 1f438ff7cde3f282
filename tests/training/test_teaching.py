"""The teacher's part in rewards and advantages: the same however the responses are shared out to ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pmd.batch import NOT_SAMPLED, RolloutBatch, Sample, Segment
from megatron_pmd.config import RunConfig, override
from megatron_pmd.errors import ConfigError
from megatron_pmd.training.state import Iteration
from megatron_pmd.training.subproblem import Subproblem
from megatron_pmd.training.teaching import log_ratios, taught, together
from recipes import recipe

TEACHER = ["algorithm.teacher.url=http://here", "rollout.temperature=1", "algorithm.tau=0.5"]
RNG = np.random.default_rng(0)
LENGTHS = [4, 1, 3, 5]


def sample(number: int, length: int, teacher: Any = None) -> Sample:
    return Sample(
        group=number // 2, number=number % 2, problem=number // 2, prompt="", response="", answer="",
        prompt_tokens=np.ones(2 + number), response_tokens=np.ones(length),
        engine_log_probs=np.zeros(length), finish_reason="stop", weight_version=0, seed=0,
        reward=float(number), teacher_log_probs=teacher,
    )  # fmt: skip


SAMPLES = [sample(i, length, -RNG.random(length).astype(np.float32)) for i, length in enumerate(LENGTHS)]
SAMPLES[0].segments = [Segment(1, 0), Segment(2, NOT_SAMPLED, counted=False), Segment(1, 0)]
ANCHORS = [-RNG.random(length) for length in LENGTHS]


def config_with(*settings: str) -> RunConfig:
    return override(recipe("tiny_moe_cpu"), [*TEACHER, *settings])


def expected() -> list[float]:
    """Σ log π_T − log π_t of each response's counted tokens."""
    counted = [np.array([True, False, False, True]), *(np.ones(n, bool) for n in LENGTHS[1:])]
    return [
        float((np.asarray(s.teacher_log_probs) - a)[c].sum())
        for s, a, c in zip(SAMPLES, ANCHORS, counted, strict=True)
    ]


def found(shares: list[list[int]], known: list[list[int]]) -> tuple[np.ndarray, dict[str, float]]:
    """By ranks that hold the tokens of `shares`, and have computed log π_t of `known`."""
    example = sample(4, 6)
    described = RolloutBatch.describe([*SAMPLES, example], 1.0, examples=1)
    reports = []
    for numbers, computed in zip(shares, known, strict=True):
        samples = np.array([*numbers, 4])
        batch = described.share(samples, np.empty(described.share_bytes(samples), np.uint8))
        batch.fill([*SAMPLES, example])
        anchor = np.full(len(batch.tokens), np.nan, np.float32)
        for i in computed:
            end = batch.tokens.offsets[i + 1]
            anchor[end - LENGTHS[i] : end] = ANCHORS[i]
        reports.append(log_ratios(batch, anchor))
    return together(described, reports)


@pytest.mark.parametrize(
    ("shares", "known"),
    [
        ([[0, 1, 2, 3]], [[0, 1, 2, 3]]),
        ([[0, 3], [1, 2]], [[0, 3], [1, 2]]),  # two replicas
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[], [0, 1, 2, 3]]),  # two pipeline stages
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]),  # two tensor-parallel ranks
    ],
)
def test_the_log_ratios_are_those_of_all_counted_tokens_under_any_layout(
    shares: list[list[int]], known: list[list[int]]
) -> None:
    values, logged = found(shares, known)
    np.testing.assert_allclose(values, expected(), rtol=1e-5)
    assert logged["teacher/kl"] == pytest.approx(-sum(expected()) / 4, rel=1e-5)
    assert logged["teacher/kl/per_token"] == pytest.approx(-sum(expected()) / 11, rel=1e-5)
    assert logged["teacher/mean_abs"] >= abs(logged["teacher/kl/per_token"])


def test_an_iteration_takes_its_log_ratios_from_the_anchor_and_logs_them() -> None:
    def run_with(config: RunConfig) -> Any:
        return SimpleNamespace(config=config, control=SimpleNamespace(all_gather=lambda value: [value]))

    batch = RolloutBatch.pack([replace(sample, tau=0.5) for sample in SAMPLES], 1.0)
    anchor = np.zeros(len(batch.tokens), np.float32)
    for i, values in enumerate(ANCHORS):
        anchor[batch.tokens.offsets[i + 1] - LENGTHS[i] : batch.tokens.offsets[i + 1]] = values
    report: Any = SimpleNamespace(log_probs=torch.from_numpy(anchor))
    iteration = Iteration(0, left_over=[])
    found = taught(run_with(config_with("algorithm.objective=distillation")), iteration, batch, report)
    np.testing.assert_allclose(found.samples.advantages, 0.5 * np.array(expected()), rtol=1e-5)
    assert found.tokens is batch.tokens and set(iteration.values) >= {"teacher/kl", "teacher/mean_abs"}
    assert taught(run_with(recipe("tiny_moe_cpu")), iteration, batch, report) is batch


def test_with_a_reward_the_group_shares_one_baseline_of_reward_and_teacher() -> None:
    """r + τ β d minus its mean over the group, as docs/algorithm.md has it.

    A supervised example, numbered from group 0 and without a τ, is no part of it.
    """
    subproblem = Subproblem(config_with("algorithm.teacher.weight=0.25"), 0)
    samples, example = [replace(s) for s in SAMPLES], replace(sample(4, 6), group=0)
    subproblem.compute_advantages(samples)
    values = np.array(expected())
    known = subproblem.taught(RolloutBatch.describe([*samples, example], 1.0, examples=1), values)
    mixed = np.array([0.0, 1.0, 2.0, 3.0]) + 0.5 * 0.25 * values
    np.testing.assert_allclose(known.rewards, [*mixed, 0.0], atol=1e-12)
    centred = mixed.reshape(2, 2) - mixed.reshape(2, 2).mean(1, keepdims=True)
    np.testing.assert_allclose(known.advantages, [*centred.reshape(-1), 0.0], atol=1e-12)
    assert known.taus.tolist() == [0.5, 0.5, 0.5, 0.5, 0.0] and subproblem.baseline == "mean"


def test_distillation_leaves_rewards_out_and_reports_its_progress_towards_the_teacher() -> None:
    """The target log-ratio that diagnostics compare s with is A/τ = d."""
    from megatron_pmd.algorithm.diagnostics import targets

    subproblem = Subproblem(config_with("algorithm.objective=distillation"), 0)
    samples = [replace(s) for s in SAMPLES]
    subproblem.compute_advantages(samples)
    values = np.array(expected())
    known = subproblem.taught(RolloutBatch.describe(samples, 1.0), values)
    target, _ = targets(
        known.advantages, known.rewards, known.groups, baseline=subproblem.baseline, tau=known.taus
    )
    np.testing.assert_allclose(target, values, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.temperature=2"], r"with rollout\.temperature=2: SGLang gives a teacher's"),
        (["rollout.temperature_schedule.end=0.5", "rollout.temperature_schedule.iterations=2"], "a schedule"),
        (["rollout.group_filter.max_dropped=3"], r"drop_equal_rewards: the teacher tells"),
        (["rollout.agent.function=agent.py:solve"], r"with rollout\.agent: a teacher scores one trajectory"),
        (["algorithm.objective=distillation", "algorithm.teacher.weight=2"], r"weight=2: .*has no reward"),
    ],
)
def test_settings_that_a_teacher_makes_wrong_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(*settings)


def test_distillation_without_a_teacher_and_a_teacher_without_samples_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"objective=distillation learns from a teacher: set algorithm\.teacher"
    ):
        override(recipe("tiny_moe_cpu"), ["algorithm.objective=distillation"])
    with pytest.raises(ConfigError, match=r"objective=sft: nothing is sampled that it could score"):
        config_with("algorithm.objective=sft")
