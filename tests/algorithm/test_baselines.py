from collections import defaultdict
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pmd.algorithm.baselines import BASELINES, advantages, per_standard_deviation

rewards_of_a_group = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)
batches = st.lists(rewards_of_a_group, min_size=1, max_size=4)
taus = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
baselines = st.sampled_from(sorted(BASELINES))


def exact_baseline(rewards: list[float], i: int, baseline: str, tau: float) -> float:
    """The definition in docs/algorithm.md, term by term, with 60 digits and no overflow."""
    with localcontext(prec=60, Emin=-(10**9), Emax=10**9):
        kept = [Decimal(r) for j, r in enumerate(rewards) if not (baseline.endswith("_loo") and j == i)]
        if baseline.startswith("mean"):
            return float(sum(kept, Decimal(0)) / len(kept))
        t = Decimal(tau)
        return float(t * (sum(((r / t).exp() for r in kept), Decimal(0)) / len(kept)).ln())


@settings(max_examples=80)
@given(batches, baselines, taus, st.randoms(use_true_random=False))
def test_every_baseline_equals_its_definition_for_any_labels_sizes_and_order(groups, baseline, tau, random):
    labels = random.sample(range(-1000, 1000), len(groups))
    samples = [(label, r) for label, rewards in zip(labels, groups, strict=True) for r in rewards]
    random.shuffle(samples)

    result = advantages([r for _, r in samples], [g for g, _ in samples], baseline=baseline, tau=tau)

    members = defaultdict(list)
    for label, reward in samples:
        members[label].append(reward)
    seen: dict[int, int] = defaultdict(int)
    for (label, reward), got in zip(samples, result, strict=True):
        expected = reward - exact_baseline(members[label], seen[label], baseline, tau)
        seen[label] += 1
        assert got == pytest.approx(expected, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_lone_success_among_sixteen_keeps_its_full_advantage_at_every_tau(tau):
    """All the others failed alike, so the baseline left for the success is −1 whatever τ is."""
    result = advantages([1.0] + [-1.0] * 15, [7] * 16, baseline="partition_loo", tau=tau)
    assert result[0] == 2.0


def test_mean_and_leave_one_out_differ_by_k_over_k_minus_1():
    rewards = np.random.default_rng(0).normal(size=16)
    centred = advantages(rewards, np.zeros(16, int), baseline="mean", tau=1.0)
    left_out = advantages(rewards, np.zeros(16, int), baseline="mean_loo", tau=1.0)
    np.testing.assert_allclose(left_out, centred * 16 / 15, rtol=1e-12)


@given(st.floats(-1e3, 1e3), st.integers(2, 33), baselines, taus)
def test_equal_rewards_give_exactly_zero(reward, size, baseline, tau):
    assert (advantages([reward] * size, [3] * size, baseline=baseline, tau=tau) == 0).all()


@pytest.mark.parametrize(("partition", "mean"), [("partition", "mean"), ("partition_loo", "mean_loo")])
def test_partition_tends_to_mean_as_tau_grows(partition, mean):
    """τ log E[e^{r/τ}] = E[r] + Var[r]/2τ + O(1/τ²): ten times the τ, a tenth of the difference."""
    rewards, groups = np.random.default_rng(1).normal(size=8), np.zeros(8, int)
    limit = advantages(rewards, groups, baseline=mean, tau=1.0)
    gaps = [advantages(rewards, groups, baseline=partition, tau=tau) - limit for tau in (1e3, 1e4, 1e9)]
    np.testing.assert_allclose(gaps[1], gaps[0] / 10, rtol=1e-2)
    if partition == "partition":
        np.testing.assert_allclose(gaps[0], -rewards.var() / 2e3, rtol=1e-2)
    assert np.abs(gaps[2]).max() < 1e-8


@given(rewards_of_a_group, baselines, taus)
def test_a_baseline_lies_between_the_lowest_and_the_highest_reward(rewards, baseline, tau):
    b = np.array(rewards) - advantages(rewards, [0] * len(rewards), baseline=baseline, tau=tau)
    assert (b >= min(rewards) - 1e-9).all() and (b <= max(rewards) + 1e-9).all()


@pytest.mark.parametrize("baseline", ["mean_loo", "partition_loo"])
def test_leaving_one_out_of_one_is_an_error_that_names_the_group(baseline):
    with pytest.raises(ValueError, match="group 42 has one sample"):
        advantages([1.0, 0.0, 1.0], [3, 3, 42], baseline=baseline, tau=0.1)


@pytest.mark.parametrize("baseline", ["mean", "partition"])
def test_a_group_of_one_has_no_advantage_over_itself(baseline):
    assert advantages([5.0], [0], baseline=baseline, tau=0.1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rewards=[1.0], groups=[0], baseline="median", tau=1.0), "median.*mean, mean_loo"),
        (dict(rewards=[1.0], groups=[0], baseline="mean", tau=0.0), "tau must be positive"),
        (dict(rewards=[1.0, 2.0], groups=[0], baseline="mean", tau=1.0), "one label a sample"),
        (dict(rewards=[1.0], groups=[0.5], baseline="mean", tau=1.0), "must be integers"),
        (dict(rewards=[1.0, float("nan")], groups=[4, 9], baseline="mean", tau=1.0), r"sample 1 \(group 9\)"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        advantages(**arguments)


def test_no_samples_give_no_advantages():
    assert advantages([], [], baseline="partition_loo", tau=0.1).shape == (0,)


def test_division_by_the_deviation_is_within_each_group_and_leaves_a_group_of_one():
    result = per_standard_deviation([1.0, -1.0, 30.0, 5.0, -30.0], [1, 1, 2, 3, 2], epsilon=0.0)
    np.testing.assert_allclose(result, [0.5**0.5, -(0.5**0.5), 0.5**0.5, 5.0, -(0.5**0.5)])
    assert per_standard_deviation([0.0, 0.0], [1, 1]).tolist() == [0.0, 0.0]
