import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw

from megatron_pmd.algorithm.closed_form import (
    chi2,
    kl,
    kl_of_anchor,
    log_partition,
    mixed_objective,
    optimum_mean,
    optimum_partition,
)
from megatron_pmd.algorithm.losses import LossInput
from tests.algorithm.evaluated import evaluated

taus = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


@st.composite
def anchors(draw):
    """Rewards and anchor probabilities of 2 to 6 outcomes, probabilities down to 1e-8."""
    size = draw(st.integers(2, 6))
    rewards = draw(st.lists(st.floats(-10, 10), min_size=size, max_size=size))
    logits = draw(st.lists(st.floats(-18, 0), min_size=size, max_size=size))
    p = np.exp(np.array(logits))
    return np.array(rewards), p / p.sum()


# (p, τ): ρ* of success and failure and λ for mean; ρ* of success and failure for partition. Reward 1 or 0.
REFERENCE = {
    (0.05, 0.1): (11.33156, 0.4562335, 0.6241334, 19.98276, 9.072160e-4),
    (0.05, 1.0): (2.409673, 0.9258067, 0.02926079, 2.503220, 0.9208832),
    (0.5, 0.1): (1.993358, 0.006641873, 2.162270, 1.999909, 9.079574e-5),
    (0.01, 0.01): (73.98308, 0.2627972, 1.279971, 100.0, 3.72e-42),
}


@pytest.mark.parametrize(("p", "tau"), REFERENCE)
def test_a_binary_reward_gives_the_reference_values(p, tau):
    success, failure, weight, success_partition, failure_partition = REFERENCE[p, tau]
    log_rho, found_weight = optimum_mean([1.0, 0.0], [p, 1 - p], tau)
    assert [*np.exp(log_rho), found_weight] == pytest.approx([success, failure, weight], rel=5e-7)
    rho = np.exp(optimum_partition([1.0, 0.0], [p, 1 - p], tau))
    assert rho[0] == pytest.approx(success_partition, rel=5e-7)
    assert rho[1] == pytest.approx(failure_partition, rel=5e-7 if failure_partition > 1e-9 else 1e-3)


@given(anchors(), taus)
def test_both_optima_are_distributions_and_increase_with_the_reward(anchor, tau):
    rewards, p = anchor
    order = np.argsort(rewards)
    for log_rho in (optimum_partition(rewards, p, tau), optimum_mean(rewards, p, tau)[0]):
        assert p @ np.exp(log_rho) == pytest.approx(1, abs=1e-9)
        assert (np.diff(log_rho[order]) >= -1e-12).all()


@given(anchors(), taus)
def test_the_mean_optimum_is_stationary_and_its_weight_is_the_kl_of_the_anchor(anchor, tau):
    """Stationarity on the simplex: log ρ + λρ = A/τ for every outcome, and λ = KL(π_t ‖ π*)."""
    rewards, p = anchor
    log_rho, weight = optimum_mean(rewards, p, tau)
    a = (rewards - p @ rewards) / tau
    scale = np.abs(a).max() + 1
    np.testing.assert_allclose(log_rho + weight * np.exp(log_rho), a, atol=1e-11 * scale)
    assert weight == pytest.approx(kl_of_anchor(log_rho, p), abs=1e-11 * scale)
    assert weight >= 0


def test_the_mean_optimum_is_lamberts_function_of_the_advantage():
    rewards, p = np.array([1.0, 0.3, -0.2, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])
    log_rho, weight = optimum_mean(rewards, p, 0.2)
    a = (rewards - p @ rewards) / 0.2
    np.testing.assert_allclose(np.exp(log_rho), lambertw(weight * np.exp(a)).real / weight, rtol=1e-12)


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("tau", [1e-4, 1e-3])
def test_a_scaled_advantage_of_ten_thousand_stays_exact(p, tau):
    log_rho, weight = optimum_mean([1.0, 0.0], [p, 1 - p], tau)
    assert np.isfinite(log_rho).all()
    assert p * np.exp(log_rho[0]) + (1 - p) * np.exp(log_rho[1]) == pytest.approx(1, abs=1e-10)
    assert log_rho[0] + weight * np.exp(log_rho[0]) == pytest.approx((1 - p) / tau, rel=1e-12)


@pytest.mark.parametrize("tau", [1e2, 1e5, 1e8])
def test_for_large_tau_the_chi2_weight_is_half_the_variance_of_the_scaled_advantage(tau):
    """λ = Var[A/τ]/2 + third moment/6 + O(1/τ⁴); the symmetric reward has no third moment."""
    _, weight = optimum_mean([1.0, 0.0], [0.5, 0.5], tau)
    assert weight == pytest.approx(0.125 / tau**2, rel=1 / tau**2 + 1e-13)


@given(anchors())
def test_partition_tends_to_mean_as_tau_grows(anchor):
    """Both are A/τ + O(1/τ²); rewards here differ by up to 20."""
    rewards, p = anchor
    for tau in (1e3, 1e6):
        difference = optimum_partition(rewards, p, tau) - optimum_mean(rewards, p, tau)[0]
        assert np.abs(difference).max() <= 1e3 / tau**2


@given(st.floats(-1e3, 1e3), taus)
def test_equal_rewards_leave_the_anchor_alone(reward, tau):
    rewards, p = [reward] * 3, [0.2, 0.3, 0.5]
    log_rho, weight = optimum_mean(rewards, p, tau)
    assert (log_rho == 0).all() and weight == 0
    # log Z of probabilities that add up to 1 only within rounding
    assert np.abs(optimum_partition(rewards, p, tau)).max() <= 1e-12 * (1 + abs(reward) / tau)


def test_where_success_is_rare_mean_keeps_the_failures_that_partition_drives_out():
    mean, _ = optimum_mean([1.0, 0.0], [0.05, 0.95], 0.1)
    partition = optimum_partition([1.0, 0.0], [0.05, 0.95], 0.1)
    assert mean[0] < partition[0]
    assert np.exp(mean[1] - partition[1]) > 500


@pytest.mark.parametrize("variant", ["mean", "partition"])
def test_no_neighbour_on_the_simplex_has_a_larger_mixed_objective(variant):
    rng = np.random.default_rng(0)
    rewards, p, tau = rng.normal(size=6), rng.dirichlet(np.ones(6)), 0.3
    if variant == "mean":
        log_rho, weight = optimum_mean(rewards, p, tau)
    else:
        log_rho, weight = optimum_partition(rewards, p, tau), 0.0
    best = mixed_objective(log_rho, rewards, p, tau, weight)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(100):
            moved = log_rho + size * rng.normal(size=6)
            moved -= np.log(p @ np.exp(moved))
            assert mixed_objective(moved, rewards, p, tau, weight) < best
    if variant == "partition":
        assert best == pytest.approx(log_partition(rewards, p, tau), rel=1e-12)


def test_divergences_of_a_known_pair_of_distributions():
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    log_rho = np.log(q / p)
    assert chi2(log_rho, p) == pytest.approx(0.25)
    assert kl(log_rho, p) == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert kl_of_anchor(log_rho, p) == pytest.approx(-0.5 * np.log(0.5) - 0.5 * np.log(1.5))


def test_an_outcome_the_anchor_never_takes_does_not_matter():
    with_it, weight = optimum_mean([1.0, 0.0, 9.0], [0.3, 0.7, 0.0], 0.5)
    without, same_weight = optimum_mean([1.0, 0.0], [0.3, 0.7], 0.5)
    np.testing.assert_allclose(with_it[:2], without)
    assert weight == pytest.approx(same_weight)
    np.testing.assert_allclose(
        optimum_partition([1.0, 0.0, 9.0], [0.3, 0.7, 0.0], 0.01)[:2],
        optimum_partition([1.0, 0.0], [0.3, 0.7], 0.01),
    )


@pytest.mark.parametrize("variant", ["mean", "partition"])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_a_softmax_that_minimises_the_pmd_loss_reaches_the_closed_form(variant, tau):
    """Six arms, each a response of one token, weighted by π_t: the sum is the population loss."""
    rng = np.random.default_rng(5)
    rewards, p = rng.normal(size=6), rng.dirichlet(np.full(6, 2.0))
    if variant == "mean":
        expected, baseline = optimum_mean(rewards, p, tau)[0], float(p @ rewards)
    else:
        expected, baseline = optimum_partition(rewards, p, tau), log_partition(rewards, p, tau)
    anchor = torch.tensor(np.log(p))
    logits = anchor.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        lr=1.0,
        max_iter=5000,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        x = LossInput(
            log_probs=logits.log_softmax(0),
            anchor_log_probs=anchor,
            engine_log_probs=anchor,
            mask=torch.ones(6),
            sequence=torch.arange(6),
            advantages=torch.tensor(rewards - baseline),
            tau=torch.ones(6),
        )
        total = evaluated("pmd", x, tau=tau, mismatch=lambda _: anchor.exp()).sum
        total.backward()
        return total

    optimizer.step(loss)
    found = (logits.log_softmax(0) - anchor).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("optimum", [optimum_mean, optimum_partition])
@pytest.mark.parametrize(
    ("rewards", "p", "tau"),
    [
        ([1.0], [0.5, 0.5], 1.0),
        ([np.inf, 0.0], [0.5, 0.5], 1.0),
        ([1.0, 0.0], [0.6, 0.6], 1.0),
        ([1.0, 0.0], [1.5, -0.5], 1.0),
        ([1.0, 0.0], [0.5, 0.5], 0.0),
        ([], [], 1.0),
    ],
)
def test_what_is_not_a_distribution_over_rewards_is_refused(optimum, rewards, p, tau):
    with pytest.raises(ValueError):
        optimum(rewards, p, tau)
