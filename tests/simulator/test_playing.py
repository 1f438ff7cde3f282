"""Played runs against closed forms, bounds and accounts that hold for every run."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pmd.config import PartialRollouts
from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.lengths import LogNormal
from megatron_pmd.simulator.playing import play
from megatron_pmd.simulator.scenario import EngineFleet, Failures, Rules, Scenario, TrainerTimes

FIXED = LogNormal(median_tokens=100, sigma=0.0, max_tokens=1000, prompt_tokens=20)
VARIED = LogNormal(median_tokens=100, sigma=1.0, max_tokens=1000, prompt_tokens=20)
FLEET = EngineFleet(count=2, devices_each=2, step_seconds=tuple(0.01 + 0.001 * b for b in range(1, 9)))
TRAINER = TrainerTimes(devices=4, per_token=1e-4, release=0.5, sync=2.0, save=3.0, write=1.0)
RULES = Rules(prompts_per_rollout=16, samples_per_prompt=4, prompts_per_step=4)
SAMPLES, SLOTS = 64, 16
MODES = {
    "colocated": RULES,
    "partial": replace(RULES, partial=PartialRollouts(extra_groups=4, max_staleness=1)),
    "budget": replace(RULES, partial=PartialRollouts(max_new_tokens=60, max_staleness=1)),
    "deadline": replace(RULES, partial=PartialRollouts(deadline_seconds=4.0, max_staleness=2)),
    **{f"overlapped, staleness {n}": replace(RULES, staleness=n) for n in (0, 1, 3)},
}

scenarios = st.builds(
    Scenario,
    st.builds(
        lambda count, slots, slope: EngineFleet(
            count, 1, tuple(0.01 + slope * number for number in range(1, slots + 1))
        ),
        st.integers(1, 4), st.integers(1, 12), st.sampled_from([0.0, 0.001]),
    ),
    st.builds(
        TrainerTimes, devices=st.just(4), per_token=st.sampled_from([0.0, 1e-4, 2e-3]),
        release=st.just(0.5), sync=st.sampled_from([0.0, 2.0]), save=st.just(3.0),
        write=st.sampled_from([0.0, 40.0]),
    ),
    st.builds(replace, st.sampled_from([*MODES.values()]), save_every=st.sampled_from([None, 1, 3])),
    st.builds(Failures, st.sampled_from([0.0, 1e-4]), st.sampled_from([5.0, 60.0])),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(scenarios, st.integers(0, 1000))
def test_every_response_token_and_second_is_accounted_for(scenario: Scenario, seed: int) -> None:
    played = play(scenario, VARIED, iterations=6, seed=seed)
    found, times = played.accounts, played.times
    assert found.started == found.trained + found.waiting + found.in_flight + found.dropped + found.lost
    kept = found.trained_tokens + found.kept_tokens + found.dropped_tokens + found.lost_tokens
    assert played.decoded_tokens == pytest.approx(kept)
    spent = times.training + times.waiting + times.syncing + times.saving + times.lost
    assert times.seconds == pytest.approx(spent)
    assert found.trained == times.samples == played.staleness.total()
    assert sum(played.device_shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 + 1e-9 for share in played.device_shares.values())
    assert list(played.ends) == sorted(played.ends)


@settings(max_examples=30, deadline=None)
@given(scenarios, st.integers(0, 1000))
def test_no_run_is_faster_than_either_side_or_trains_on_what_is_too_old(
    scenario: Scenario, seed: int
) -> None:
    played = play(scenario, VARIED, iterations=6, seed=seed)
    fleet, times, rules = scenario.fleet, played.times, scenario.rules
    fastest = max(running / step for running, step in enumerate(fleet.step_seconds, 1))
    assert played.decoded_tokens <= fleet.count * fastest * times.seconds * (1 + 1e-9)
    assert times.response_tokens * scenario.trainer.per_token <= times.seconds
    most = rules.staleness if rules.staleness is not None else 0
    if rules.partial:
        most = rules.partial.max_staleness
    assert played.max_staleness <= most


def test_a_colocated_iteration_of_equal_lengths_is_sampling_training_and_sync() -> None:
    """64 responses on 2 engines of 8 slots: four waves of 100 steps of 18 ms."""
    played = play(Scenario(FLEET, TRAINER, RULES), FIXED, iterations=5, seed=0)
    sampling, training = SAMPLES / SLOTS * 100 * 0.018, SAMPLES * 120 * 1e-4
    assert played.rollout_seconds == pytest.approx(sampling + 0.5 + training + 2.0)
    assert played.times.waiting == pytest.approx(5 * sampling)
    assert played.slots_used == pytest.approx(1)
    assert played.mean_staleness == 0


@pytest.mark.parametrize(
    "per_token", [1e-5, 1e-4, 2e-3], ids=["sampling is slower", "near", "training is slower"]
)
def test_an_overlapped_iteration_of_equal_lengths_is_the_slower_side_and_the_sync(per_token: float) -> None:
    trainer = replace(TRAINER, per_token=per_token, release=0.0)
    scenario = Scenario(FLEET, trainer, replace(RULES, staleness=1))
    played = play(scenario, FIXED, iterations=12, seed=0, warm_up=3)
    sampling, training = SAMPLES / SLOTS * 100 * 0.018, SAMPLES * 120 * per_token
    assert played.rollout_seconds == pytest.approx(max(sampling, training) + 2.0)
    assert played.trainer_waits == pytest.approx(
        max(0.0, sampling - training) / (max(sampling, training) + 2.0)
    )


def test_without_staleness_the_two_sides_work_in_turn_also_on_devices_of_their_own() -> None:
    trainer = replace(TRAINER, release=0.0)
    apart, together = (
        play(Scenario(FLEET, trainer, rules), VARIED, iterations=6, seed=3)
        for rules in (replace(RULES, staleness=0), RULES)
    )
    assert apart.ends == pytest.approx(together.ends)
    assert apart.max_staleness == 0
    assert apart.device_shares["idle"] > 0.4 > together.device_shares["idle"]


def test_a_partial_rollout_ends_with_the_fastest_groups_and_keeps_the_rest() -> None:
    """One slot for each response: the rollout takes as long as its wanted-th group, by the lengths alone."""
    groups, wanted = 12, 8
    fleet = EngineFleet(1, 1, (0.01,) * (groups * 2))
    rules = Rules(wanted, 2, 4, PartialRollouts(extra_groups=groups - wanted))
    played = play(Scenario(fleet, TrainerTimes(1, 0.0), rules), VARIED, iterations=1, seed=5)
    chance = random.Random(5)
    slowest = sorted(max(VARIED.draw(chance, 2)[1]) for _ in range(groups))
    assert played.times.waiting == pytest.approx(slowest[wanted - 1] * 0.01)
    assert (played.accounts.trained, played.accounts.started) == (2 * wanted, 2 * groups)
    assert played.accounts.in_flight == 2 * (groups - wanted)


def test_more_staleness_never_makes_a_run_slower() -> None:
    rates = [
        play(
            Scenario(FLEET, TRAINER, replace(RULES, staleness=n)), VARIED, 20, seed=1, warm_up=6
        ).samples_per_second
        for n in range(5)
    ]
    assert rates == pytest.approx(sorted(rates))
    assert rates[4] > 1.3 * rates[0]


def test_the_same_seed_plays_the_same_run_and_another_seed_another() -> None:
    failing = Scenario(FLEET, TRAINER, replace(RULES, staleness=1, save_every=2), Failures(1e-4, 30.0))
    assert play(failing, VARIED, 6, seed=1) == play(failing, VARIED, 6, seed=1)
    assert play(failing, VARIED, 6, seed=1).ends != play(failing, VARIED, 6, seed=2).ends


# failures


def failing(rate: float, iterations: int, save_every: int | None = 4) -> Played:
    """Iterations of 10 s, a checkpoint of 3 s after every fourth; 50 s until a failed run works again."""
    fleet = EngineFleet(1, 4, (0.1,) * 2)
    trainer = TrainerTimes(4, per_token=0.0, sync=0.0, save=3.0)
    scenario = Scenario(fleet, trainer, Rules(1, 2, save_every=save_every), Failures(rate / 4, 50.0))
    return play(scenario, FIXED, iterations, seed=7)


def test_where_nothing_fails_nothing_is_lost() -> None:
    played = failing(0.0, 8)
    assert played.times.seconds == pytest.approx(8 * 10 + 2 * 3)
    assert (played.failures, played.times.lost, played.accounts.lost) == (0, 0.0, 0)


def test_the_time_lost_is_that_of_a_poisson_process() -> None:
    """A segment of work τ between two checkpoints takes (1/λ + R)(exp(λτ) − 1) on average, R the restart.

    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006,
    eq. 13, with a restart that does not fail itself.
    """
    rate, segments, work = 1 / 120, 2000, 43.0
    played = failing(rate, 4 * segments)
    expected = (1 / rate + 50.0) * (math.exp(rate * work) - 1)
    assert played.times.seconds / segments == pytest.approx(expected, rel=0.03)
    assert played.times.lost / segments == pytest.approx(expected - work, rel=0.06)


def test_a_run_without_checkpoints_begins_from_nothing() -> None:
    played = failing(1 / 40, 4, save_every=None)
    assert played.failures > 0
    assert played.times.seconds == pytest.approx(4 * 10 + played.times.lost)
    assert played.accounts.trained == 8


def test_a_lost_engine_costs_its_running_tokens_and_the_run_goes_on() -> None:
    """The trainer has no device here, so that only engines fail."""
    trainer = replace(TRAINER, devices=0)
    rules = replace(RULES, staleness=2)
    played = play(Scenario(FLEET, trainer, rules, Failures(1e-2, 20.0)), VARIED, 10, seed=0)
    calm = play(Scenario(FLEET, trainer, rules), VARIED, 10, seed=0)
    assert played.engine_failures > 2
    assert (played.failures, played.times.lost, played.accounts.lost) == (0, 0.0, 0)
    assert played.accounts.lost_tokens > 0
    assert played.accounts.trained == calm.accounts.trained
    assert played.times.seconds > calm.times.seconds
    assert played.max_staleness <= 2


def test_a_checkpoint_counts_once_its_last_file_is_on_the_disk() -> None:
    """Written in 1,000 s, beside iterations of 10 s: the second save waits for the first one."""
    fleet, rules = EngineFleet(1, 1, (0.1,) * 2), Rules(1, 2, save_every=4)
    trainer = TrainerTimes(4, per_token=0.0, save=3.0, write=1000.0)
    played = play(Scenario(fleet, trainer, rules), FIXED, 8, seed=0)
    assert played.ends[3] == pytest.approx(43)
    assert played.ends[7] == pytest.approx(43 + 1000 + 3)
