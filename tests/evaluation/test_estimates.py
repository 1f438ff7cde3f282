"""What graded samples say: mean@k and pass@k against brute force, and how often the intervals hold."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_pmd.batch import Sample
from megatron_pmd.evaluation.estimates import evaluate


def sample(group: int, number: int, reward: float, **changes: Any) -> Sample:
    values: dict[str, Any] = dict(
        group=group, number=number, problem=group, prompt="", response="", answer="", prompt_tokens=[1],
        response_tokens=[2, 3], engine_log_probs=[-1.0, -1.0], finish_reason="stop", weight_version=0, seed=0,
        reward=reward,
    )  # fmt: skip
    return Sample(**(values | changes))


def samples_of(rewards: np.ndarray) -> list[Sample]:
    """rewards [prompts, k]"""
    return [sample(g, n, float(r)) for g, row in enumerate(rewards) for n, r in enumerate(row)]


@pytest.mark.parametrize("k", [1, 2, 8])
def test_mean_and_pass_equal_counting_by_hand(k):
    rewards = np.random.default_rng(k).choice([0.0, 0.5, 1.0], size=(40, k), p=[0.6, 0.3, 0.1])
    drawn = samples_of(rewards)
    random.Random(0).shuffle(drawn)
    result = evaluate(drawn)

    total, solved = 0.0, 0
    for row in rewards.tolist():
        total += sum(row)
        solved += any(reward == 1.0 for reward in row)  # a half-right answer is no pass
    assert result.mean_at_k.value == pytest.approx(total / (40 * k))
    assert result.pass_at_k.value == pytest.approx(solved / 40)
    assert (result.k, result.prompts) == (k, 40)


def test_truncation_length_and_reward_errors_are_counted_over_samples():
    drawn = [
        sample(0, 0, 1.0, finish_reason="length", response_tokens=[1] * 10, engine_log_probs=[0.0] * 10),
        sample(0, 1, 0.0, reward_error="no verdict within 10 s"),
        sample(1, 0, 0.0),
        sample(1, 1, 0.0),
    ]
    result = evaluate(drawn)
    assert result.truncated_share == 0.25
    assert result.response_tokens == pytest.approx(16 / 4)
    assert result.reward_errors == 1


def test_an_agents_response_of_several_trajectories_counts_once():
    alone = [sample(0, 0, 1.0), sample(0, 1, 0.0, reward_error="late")]
    with_branches = [alone[0], sample(0, 0, 1.0, branch=1), *alone[1:], sample(0, 1, 0.0, branch=1)]
    for found in (evaluate(alone), evaluate(with_branches)):
        assert (found.k, found.mean_at_k.value, found.reward_errors) == (2, 0.5, 1)


def test_intervals_hold_the_true_value_in_about_95_of_100_evaluations():
    """48 prompts whose difficulty p ~ Beta(1, 2), 4 samples each: mean 1/3, pass@4 = 1 − E[(1 − p)⁴].

    E[(1 − p)⁴] = ∫ (1 − p)⁴ 2(1 − p) dp = 2/6. Of 200 evaluations 95 % are 190; fewer than 176 have a chance
    of 1e-4.
    """
    generator = np.random.default_rng(7)
    mean, solved = 1 / 3, 1 - 2 / 6
    held = {"mean": 0, "pass": 0}
    for _ in range(200):
        chance = generator.beta(1, 2, size=(48, 1))
        result = evaluate(samples_of((generator.random((48, 4)) < chance).astype(float)))
        held["mean"] += result.mean_at_k.low <= mean <= result.mean_at_k.high
        held["pass"] += result.pass_at_k.low <= solved <= result.pass_at_k.high
    assert min(held.values()) >= 176, held


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_proportion_is_uncertain_also_where_every_prompt_agrees(reward):
    result = evaluate(samples_of(np.full((10, 3), reward)))
    assert result.pass_at_k.value == reward
    # Wilson at 0 of n: 1.96² / (n + 1.96²)
    assert result.pass_at_k.high - result.pass_at_k.low == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-3)


def test_metrics_are_plain_numbers_for_the_journal():
    metrics = evaluate(samples_of(np.eye(4))).metrics()
    assert metrics["mean_at_k"] == 0.25
    assert metrics["pass_at_k/low"] < metrics["pass_at_k"] == 1.0
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_each_source_of_a_mixture_is_scored_as_if_it_were_alone():
    """With its own bound of what is correct; together each prompt counts once."""
    generator = np.random.default_rng(5)
    sums = samples_of((generator.random((20, 4)) < 0.3).astype(float))
    words = samples_of(generator.choice([0.0, 0.4, 0.7], size=(10, 4)))
    for drawn, name, first in ((sums, "sums", 0), (words, "words", 20)):
        for one in drawn:
            one.source, one.group = name, one.group + first
    correct = {"sums": 1.0, "words": 0.5}
    together = evaluate([*sums, *words], correct)
    for name, drawn in (("sums", sums), ("words", words)):
        unnamed = [replace(one, source="") for one in drawn]
        alone = evaluate(unnamed, {"": correct[name]})
        assert together.sources[name] == alone
        expected = {f"source/{name}/{key}": value for key, value in alone.metrics().items()}
        assert expected.items() <= together.metrics().items()
    parts = together.sources.values()
    assert together.prompts == 30
    for score in ("mean_at_k", "pass_at_k"):
        mean = sum(part.prompts * getattr(part, score).value for part in parts) / 30
        assert getattr(together, score).value == pytest.approx(mean)
    assert evaluate(samples_of(np.eye(4))).sources == {}
