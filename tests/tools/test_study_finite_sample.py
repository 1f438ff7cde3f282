"""The study's own arithmetic, against brute force and known rates."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit

from tools.studies.finite_sample import DEVIATION, SUCCESS, measure, solve


@pytest.mark.parametrize(("ts", "tf"), [(5.0, -5.0), (0.4, -0.04), (2.2, -100.0), (90.0, -10.0)])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_regression_is_solved_to_its_minimum(n, ts, tf):
    def loss(u: float) -> float:
        success = -np.logaddexp(0, -u) - np.log(SUCCESS)
        failure = -np.logaddexp(0, u) - np.log1p(-SUCCESS)
        return n * (success - ts) ** 2 + (8 - n) * (failure - tf) ** 2

    found = solve(np.array([n]), 8, np.array([ts]), np.array([tf]))[0]
    best = minimize_scalar(loss, bounds=(-200, 200), method="bounded", options={"xatol": 1e-10})
    assert found == pytest.approx(expit(best.x), rel=1e-5)


def test_a_group_with_one_outcome_stays_at_the_anchor():
    for n in (0, 8):
        assert solve(np.array([n]), 8, np.zeros(1), np.zeros(1))[0] == SUCCESS


def test_the_mean_baselines_error_is_the_standard_error_of_a_mean():
    for size in (4, 64):
        point = measure(size, 0.1, "mean", np.random.default_rng(0))
        assert point.baseline_error == pytest.approx(np.sqrt(SUCCESS * (1 - SUCCESS) / size), rel=0.05)
        assert point.baseline_error_normal == pytest.approx(DEVIATION / np.sqrt(size), rel=0.05)


def test_at_small_tau_the_partition_baseline_misses_rewards_that_no_sample_has():
    """K normal rewards reach at most about σ√(2 ln K); τ log Z is σ²/2τ = 4.5 at τ = 0.01."""
    point = measure(64, 0.01, "partition", np.random.default_rng(0))
    assert point.baseline_error_normal > 4.5 - DEVIATION * np.sqrt(2 * np.log(64)) - 0.1
