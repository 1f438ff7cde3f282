from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax

from megatron_pmd.algorithm.closed_form import log_partition, optimum_mean, optimum_partition
from megatron_pmd.algorithm.losses import LossInput
from megatron_pmd.algorithm.mismatch import none, sequence_tis
from megatron_pmd.algorithm.stale_optimum import optimum_of_stale_samples
from tests.algorithm.evaluated import evaluated

# (p under a, q under b, τ): ν, and the success probability after the update, with the anchor at a, with fresh
# samples of a, and with the anchor at b. Reward 1 or 0.
REFERENCE = {
    (0.3, 0.1, 0.1): (1.009068, 0.795295, 0.967918, 0.745888),
    (0.3, 0.1, 1.0): (0.134749, 0.419352, 0.514192, 0.220253),
    (0.1, 0.3, 0.1): (1.482709, 0.958925, 0.745888, 0.967918),
    (0.5, 0.05, 0.1): (0.612606, 0.743043, 0.996679, 0.566578),
    (0.6, 0.1, 0.5): (0.236463, 0.697526, 0.888424, 0.345269),
}


@st.composite
def policies(draw):
    """Rewards of 2 to 5 outcomes, and two policies with probabilities down to some 1e-4."""
    size = draw(st.integers(2, 5))
    rewards = draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size))
    b, a = (
        np.exp(log_softmax(draw(st.lists(st.floats(-8, 0), min_size=size, max_size=size)))) for _ in range(2)
    )
    return np.array(rewards), b, a


taus = st.floats(-1, 1).map(lambda exponent: 10.0**exponent)


@pytest.mark.parametrize(("p", "q", "tau"), REFERENCE)
def test_a_binary_reward_gives_the_reference_values(p, q, tau):
    a, b = [p, 1 - p], [q, 1 - q]
    nu = optimum_of_stale_samples([1.0, 0.0], b, a, tau)[1]
    successes = [
        anchor[0] * np.exp(optimum_of_stale_samples([1.0, 0.0], sampled, anchor, tau)[0][0])
        for sampled, anchor in ((b, a), (a, a), (b, b))
    ]
    assert (nu, *successes) == pytest.approx(REFERENCE[p, q, tau], abs=1e-6)


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("way", ["mean", "weighted", "weighted, baseline of a", "partition"])
def test_a_softmax_that_minimises_the_pmd_loss_on_old_samples_reaches_the_optimum_of_each_way(way, tau):
    """Six arms, each a response of one token, as often as b draws it; the engine's policy is b."""
    rng = np.random.default_rng(7)
    rewards, b, a = rng.normal(size=6), *(rng.dirichlet(np.full(6, 2.0)) for _ in range(2))
    of_b = float(b @ rewards)
    ways: dict[str, tuple[float, Any]] = {
        "mean": (of_b, optimum_of_stale_samples(rewards, b, a, tau)[0]),
        "weighted": (of_b, optimum_of_stale_samples(rewards, a, a, tau, baseline=of_b)[0]),
        "weighted, baseline of a": (float(a @ rewards), optimum_mean(rewards, a, tau)[0]),
        # of the true Z; b does not matter
        "partition": (log_partition(rewards, a, tau), optimum_partition(rewards, a, tau)),
    }
    baseline, expected = ways[way]
    anchor, drawn = torch.tensor(np.log(a)), torch.tensor(b)

    def weight(mismatch):
        return drawn * (sequence_tis(mismatch, cap=1e9) if "weighted" in way else none(mismatch))

    def loss(logits):
        parameter: Any = torch.tensor(logits, requires_grad=True)
        x = LossInput(
            log_probs=parameter.log_softmax(0),
            anchor_log_probs=anchor,
            engine_log_probs=drawn.log(),
            mask=torch.ones(6),
            sequence=torch.arange(6),
            advantages=torch.tensor(rewards - baseline),
            tau=torch.ones(6),
        )
        total = evaluated("pmd", x, tau=tau, mismatch=weight).sum
        total.backward()
        return total.item(), parameter.grad.numpy()

    found = minimize(loss, np.log(a), jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 5000}).x
    np.testing.assert_allclose(log_softmax(found) - np.log(a), expected, atol=2e-5)


@given(policies(), taus)
def test_it_is_stationary_and_a_distribution_and_nu_is_the_difference_of_divergences(case, tau):
    rewards, b, a = case
    log_rho, nu = optimum_of_stale_samples(rewards, b, a, tau)
    rho = np.exp(log_rho)
    assert a @ rho == pytest.approx(1, abs=1e-8)
    advantage = rewards - b @ rewards
    assert log_rho + nu * a / b * rho == pytest.approx(advantage / tau, rel=1e-6, abs=1e-6)
    pi = a * rho
    # KL(b ‖ π) − KL(b ‖ a)
    assert nu == pytest.approx(b @ (np.log(b) - np.log(pi)) - b @ (np.log(b) - np.log(a)), abs=1e-6)


@given(policies(), taus)
def test_with_fresh_samples_it_is_the_fresh_optimum_and_nu_its_lambda(case, tau):
    rewards, _, a = case
    log_rho, nu = optimum_of_stale_samples(rewards, a, a, tau)
    fresh, weight = optimum_mean(rewards, a, tau)
    assert log_rho == pytest.approx(fresh, abs=1e-6) and nu == pytest.approx(weight, abs=1e-6)


def test_of_two_minima_the_deeper_one_is_found():
    """The outcome that was hardly sampled costs little, so it takes the probability that the others leave."""
    rewards, b, a = np.array([-1.0, 1.0, 0.0]), np.array([0.016, 0.867, 0.117]), np.full(3, 1 / 3)
    log_rho, nu = optimum_of_stale_samples(rewards, b, a, 10**-0.375)
    target = (rewards - b @ rewards) / 10**-0.375
    assert 0.5 * b @ (log_rho - target) ** 2 < 0.18  # 0.205 where every outcome is on W's principal branch
    assert log_rho[0] > 0 > nu


@settings(max_examples=20)
@given(policies(), st.floats(-0.5, 1).map(lambda exponent: 10.0**exponent))
def test_no_minimiser_finds_a_smaller_loss(case, tau):
    """BFGS over the logits, from the anchor and from the solution."""
    rewards, b, a = case
    assume(np.abs(rewards - b @ rewards).max() > 1e-3)
    target = (rewards - b @ rewards) / tau

    def loss(logits):
        return 0.5 * b @ (log_softmax(logits) - np.log(a) - target) ** 2

    log_rho, _ = optimum_of_stale_samples(rewards, b, a, tau)
    found = loss(log_rho + np.log(a))
    for start in (np.log(a), log_rho + np.log(a)):
        assert minimize(loss, start, method="BFGS", options={"gtol": 1e-9}).fun >= found - 1e-7


@given(policies(), taus, st.integers(0, 2**32 - 1))
def test_it_maximises_the_reward_with_a_penalty_towards_the_policy_that_sampled(case, tau, seed):
    """E_π[r] − τ KL(π ‖ a) − (ντ/2) χ²(π ‖ b), which is concave for ν ≥ 0: no mixture with it is better."""
    rewards, b, a = case
    log_rho, nu = optimum_of_stale_samples(rewards, b, a, tau)
    assume(nu >= 0)

    def objective(pi):
        return pi @ rewards - tau * pi @ np.log(pi / a) - nu * tau / 2 * b @ (pi / b - 1) ** 2

    pi = a * np.exp(log_rho)
    other = np.random.default_rng(seed).dirichlet(np.ones(len(pi)))
    for share in (1e-3, 0.1, 0.9):
        assert objective((1 - share) * pi + share * other) <= objective(pi) + 1e-9


def test_where_a_better_policy_sampled_and_the_update_is_gentle_nu_is_negative():
    _, nu = optimum_of_stale_samples([1.0, 0.0], [0.99, 0.01], [0.01, 0.99], 0.5)
    assert nu < 0


def test_an_outcome_that_one_of_the_policies_never_draws_is_refused():
    with pytest.raises(ValueError, match="probability 0"):
        optimum_of_stale_samples([1.0, 0.0], [1.0, 0.0], [0.5, 0.5], 1.0)


@pytest.mark.parametrize(
    ("way", "ends"),
    [
        ("anchor a", (0.934, 0.838, 0.723, 0.543, 0.493)),
        ("anchor b", (0.934, 0.461, 0.257, 0.257, 0.120)),
        # not of the reference, whose weighted samples have a weighted mean: docs/algorithm.md
        ("weighted", (0.934, 0.896, 0.866, 0.837, 0.834)),
    ],
)
def test_iterations_with_a_lag_end_where_the_reference_does(way, ends):
    """From p = 0.05 at τ = 1: success after 6 iterations on samples that are `lag` iterations old."""
    for lag, expected in zip((0, 1, 2, 4, 8), ends, strict=True):
        success = [0.05]
        for t in range(6):
            p, q = success[t], success[max(0, t - lag)]
            anchor, sampled = q if way == "anchor b" else p, p if way == "weighted" else q
            log_rho, _ = optimum_of_stale_samples(
                [1.0, 0.0], [sampled, 1 - sampled], [anchor, 1 - anchor], 1.0, baseline=q
            )
            success.append(anchor * float(np.exp(log_rho[0])))
        assert success[-1] == pytest.approx(expected, abs=6e-4), lag
