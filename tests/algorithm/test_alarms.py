"""Each alarm is silent in a healthy run, and says what it saw in a sick one."""

import pytest

from megatron_pmd.algorithm.alarms import ALARMS, raised

HEALTHY = {
    "mismatch/mean_abs": 0.02,
    "sync/max_abs_difference": 1.0,
    "pmd/progress": 0.4,
    "pmd/kl_anchor_k3": 0.05,
    "pmd/zero_advantage_groups": 0.3,
    "entropy": 1.0,
}
THRESHOLDS = {
    "mismatch_growth": 3.0,
    "mismatch_max": 10.0,
    "progress": 1.5,
    "kl_jump": 10.0,
    "zero_advantage_groups": 0.9,
    "entropy_collapse": 0.1,
}
SICK = {
    "mismatch_growth": {"mismatch/mean_abs": 0.061},
    "mismatch_max": {"sync/max_abs_difference": 10.1},
    "progress": {"pmd/progress": 1.51},
    "kl_jump": {"pmd/kl_anchor_k3": 0.51},
    "zero_advantage_groups": {"pmd/zero_advantage_groups": 0.91},
    "entropy_collapse": {"entropy": 0.09},
}


def test_a_healthy_iteration_raises_nothing():
    assert raised(HEALTHY, [HEALTHY] * 5, THRESHOLDS) == {}


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_is_raised_by_its_own_quantity_alone_and_names_it(name):
    (key, value), *_ = SICK[name].items()
    found = raised(HEALTHY | SICK[name], [HEALTHY] * 5, THRESHOLDS)
    assert found.keys() == {name}
    assert key in found[name] and f"{value:.3g}" in found[name]


@pytest.mark.parametrize("name", ALARMS)
def test_a_value_at_the_threshold_is_still_quiet(name):
    at = {
        "mismatch_growth": {"mismatch/mean_abs": 0.06},
        "mismatch_max": {"sync/max_abs_difference": 10.0},
        "progress": {"pmd/progress": 1.5},
        "kl_jump": {"pmd/kl_anchor_k3": 0.5},
        "zero_advantage_groups": {"pmd/zero_advantage_groups": 0.9},
        "entropy_collapse": {"entropy": 0.1},
    }[name]
    assert raised(HEALTHY | at, [HEALTHY] * 5, THRESHOLDS) == {}


@pytest.mark.parametrize("name", ["mismatch_growth", "kl_jump"])
def test_growth_needs_three_earlier_iterations_to_compare_with(name):
    assert raised(HEALTHY | SICK[name], [HEALTHY] * 2, THRESHOLDS) == {}
    assert raised(HEALTHY | SICK[name], [HEALTHY] * 3, THRESHOLDS).keys() == {name}


def test_growth_is_measured_from_the_median_so_one_outlier_does_not_hide_the_next():
    earlier = [HEALTHY, HEALTHY, HEALTHY | {"pmd/kl_anchor_k3": 100.0}]
    assert raised(HEALTHY | SICK["kl_jump"], earlier, THRESHOLDS).keys() == {"kl_jump"}


def test_growth_of_numerical_noise_is_no_alarm():
    """An fp32 run's mismatch of 1e-7 may well grow tenfold: 3 times the floor of 1e-3 is the least that
    counts."""
    quiet = HEALTHY | {"mismatch/mean_abs": 1e-7}
    assert raised(quiet | {"mismatch/mean_abs": 2.9e-3}, [quiet] * 5, THRESHOLDS) == {}
    assert raised(quiet | {"mismatch/mean_abs": 3.1e-3}, [quiet] * 5, THRESHOLDS) != {}


def test_a_kl_that_rounding_alone_explains_is_no_jump():
    """In bf16 the KL of two as good as equal policies was 0.028 nats, 25 times what is negligible."""
    still = HEALTHY | {"pmd/kl_anchor_k3": 0.001}
    noisy = still | {"pmd/kl_anchor_k3": 0.028}
    assert raised(noisy, [still] * 5, THRESHOLDS).keys() == {"kl_jump"}
    assert raised(noisy | {"pmd/kl_anchor_k3/floor": 0.02}, [still] * 5, THRESHOLDS) == {}
    assert raised(noisy | {"pmd/kl_anchor_k3/floor": 0.002}, [still] * 5, THRESHOLDS).keys() == {"kl_jump"}


def test_an_alarm_that_is_off_and_a_quantity_that_is_missing_raise_nothing():
    sick = HEALTHY | SICK["progress"]
    assert raised(sick, [HEALTHY] * 5, {k: v for k, v in THRESHOLDS.items() if k != "progress"}) == {}
    assert raised({}, [{}] * 5, THRESHOLDS) == {}
    assert raised({}, [], THRESHOLDS) == {}
