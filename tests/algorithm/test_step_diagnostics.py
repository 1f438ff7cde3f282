import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import bisect
from scipy.special import lambertw

from megatron_pmd.algorithm import diagnostics as module
from megatron_pmd.algorithm.baselines import BASELINES, advantages
from megatron_pmd.algorithm.diagnostics import (
    diagnostics,
    histogram_quantile,
    magnitude_histogram,
    over_iteration,
    stale_diagnostics,
    targets,
)
from megatron_pmd.algorithm.losses import LossInput
from tests.algorithm.evaluated import evaluated

GROUPS = np.repeat([5, -2, 9], 4)
REWARDS = np.array([1, -1, -1, -1, 1, 1, -1, 1, 0.3, 0.3, 0.3, 0.3])
SUMS = ("towards_target", "target_square", "explained_square", "advantage_square")
SIGNAL = "pmd/groups_with_signal"
KEYS = {
    "pmd/progress",
    "pmd/r2",
    *(f"pmd/kl_anchor_{k}{unit}" for k in ("k1", "k2", "k3") for unit in ("", "/per_token")),
    "pmd/chi2_weight",
    "pmd/log_z_gap",
    *(f"pmd/log_ratio_{p}" for p in ("p05", "p50", "p95")),
    "pmd/zero_advantage_groups",
    "pmd/groups_with_signal",
    *(f"pmd/fit/{name}" for name in SUMS),
    "pmd/drift",
    "mismatch/mean_abs",
    "mismatch/max_abs",
    "mismatch/sequence_sum_abs",
    "mismatch/effective_sample_size",
}


def arrays(log_ratio: np.ndarray, **others: np.ndarray) -> dict[str, np.ndarray]:
    """What LossTerms.per_sequence holds, zeros where the test does not say."""
    zeros = np.zeros(len(log_ratio))
    names = ("kl_k2", "kl_k3", "mismatch_sum", "mismatch_abs_sum", "mismatch_abs_max")
    return {
        **dict.fromkeys(names, zeros),
        "log_ratio": log_ratio,
        "length": zeros + 10,
        "weight": zeros + 1,
        **others,
    }


def measure(log_ratio: np.ndarray, *, baseline: str = "mean", tau: float = 0.1, **others: np.ndarray):
    a = advantages(REWARDS, GROUPS, baseline=baseline, tau=tau)
    return diagnostics(
        arrays(log_ratio, **others), advantage=a, reward=REWARDS, group=GROUPS, baseline=baseline, tau=tau
    )


def group_target(a: np.ndarray) -> tuple[np.ndarray, float]:
    """log ρ* = log(W(λe^a)/λ) with λ by bisection on mean(ρ) = 1: the definition, over a group's samples."""
    if np.ptp(a) == 0:
        return np.zeros_like(a), 0.0

    def rho(weight: float) -> np.ndarray:
        return lambertw(weight * np.exp(a)).real / weight

    weight = bisect(lambda w: rho(w).mean() - 1, 1e-9, 1e3, xtol=1e-15)
    return np.log(rho(weight)), weight


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=5), min_size=1, max_size=5),
    st.sampled_from(["mean", "mean_loo"]),
    st.floats(0.05, 3),
    st.randoms(use_true_random=False),
)
def test_targets_are_each_groups_own_optimum_in_any_order(groups, baseline, tau, random):
    samples = [(i, round(r, 1)) for i, rewards in enumerate(groups) for r in rewards]
    random.shuffle(samples)
    labels, rewards = np.array([g for g, _ in samples]), np.array([r for _, r in samples])
    a = advantages(rewards, labels, baseline=baseline, tau=tau)
    found, weights = targets(a, rewards, labels, baseline=baseline, tau=tau)
    expected_weights = []
    for label in np.unique(labels):
        expected, weight = group_target(a[labels == label] / tau)
        np.testing.assert_allclose(found[labels == label], expected, atol=1e-7)
        expected_weights.append(weight)
    np.testing.assert_allclose(np.sort(weights), np.sort(expected_weights), atol=1e-7)


@pytest.mark.parametrize("baseline", BASELINES)
def test_progress_is_zero_at_the_anchor_half_halfway_and_one_at_the_target(baseline):
    a = advantages(REWARDS, GROUPS, baseline=baseline, tau=0.1)
    target, _ = targets(a, REWARDS, GROUPS, baseline=baseline, tau=0.1)
    for share in (0.0, 0.5, 1.0):
        assert measure(share * target, baseline=baseline)["pmd/progress"] == pytest.approx(share)


@pytest.mark.parametrize("baseline", BASELINES)
def test_r2_is_zero_at_the_anchor_and_one_where_the_regression_is_exact(baseline):
    a = advantages(REWARDS, GROUPS, baseline=baseline, tau=0.1)
    assert measure(np.zeros(12), baseline=baseline)["pmd/r2"] == 0
    assert measure(a / 0.1, baseline=baseline)["pmd/r2"] == pytest.approx(1)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_step_in_which_every_reward_is_equal_has_no_nan(baseline):
    a = advantages(np.ones(8), np.repeat([0, 1], 4), baseline=baseline, tau=0.1)
    result = diagnostics(
        arrays(np.ones(8)),
        advantage=a,
        reward=np.ones(8),
        group=np.repeat([0, 1], 4),
        baseline=baseline,
        tau=0.1,
    )
    assert set(result) == KEYS - {"pmd/progress", "pmd/r2"}, "they say nothing where nothing is aimed at"
    assert np.isfinite(list(result.values())).all()
    assert result["pmd/chi2_weight"] == result["pmd/groups_with_signal"] == 0
    assert result["pmd/zero_advantage_groups"] == 1


def test_sequences_without_counted_tokens_are_left_out_of_progress():
    a = advantages(REWARDS, GROUPS, baseline="mean", tau=0.1)
    s, _ = targets(a, REWARDS, GROUPS, baseline="mean", tau=0.1)
    s[0], length = 0.0, np.full(12, 10.0)
    length[0] = 0
    assert measure(s, length=length)["pmd/progress"] == pytest.approx(1)


def test_a_third_of_the_groups_teaches_nothing_and_the_others_have_a_gap():
    """log Z gap of a group: τ log mean e^{r/τ} − mean r; at τ = 0.1 that is max + τ log(share) − mean."""
    result = measure(np.zeros(12))
    assert result["pmd/zero_advantage_groups"] == pytest.approx(1 / 3)
    expected = np.mean([1 + 0.1 * np.log(1 / 4) + 0.5, 1 + 0.1 * np.log(3 / 4) - 0.5, 0.0])
    assert result["pmd/log_z_gap"] == pytest.approx(expected, abs=1e-8)
    assert measure(np.zeros(12), baseline="partition")["pmd/chi2_weight"] == 0


def test_means_quantiles_and_sample_size_equal_their_definitions():
    rng = np.random.default_rng(0)
    s, length, k2, k3 = rng.normal(size=12), rng.integers(1, 9, 12).astype(float), *rng.random((2, 12))
    total, absolute, largest, weight = rng.normal(size=12), *rng.random((3, 12))
    result = measure(
        s,
        length=length,
        kl_k2=k2,
        kl_k3=k3,
        mismatch_sum=total,
        mismatch_abs_sum=absolute,
        mismatch_abs_max=largest,
        weight=weight,
    )
    expected = {
        "pmd/kl_anchor_k1": -s.mean(),
        "pmd/kl_anchor_k1/per_token": -s.sum() / length.sum(),
        "pmd/kl_anchor_k2": k2.mean(),
        "pmd/kl_anchor_k2/per_token": k2.sum() / length.sum(),
        "pmd/kl_anchor_k3": k3.mean(),
        "pmd/kl_anchor_k3/per_token": k3.sum() / length.sum(),
        "pmd/log_ratio_p05": np.quantile(s, 0.05),
        "pmd/log_ratio_p50": np.median(s),
        "pmd/log_ratio_p95": np.quantile(s, 0.95),
        "pmd/drift": np.abs(s).mean(),
        "mismatch/mean_abs": absolute.sum() / length.sum(),
        "mismatch/max_abs": largest.max(),
        "mismatch/sequence_sum_abs": np.abs(total).mean(),
        "mismatch/effective_sample_size": weight.sum() ** 2 / (12 * (weight**2).sum()),
    }
    assert {k: result[k] for k in expected} == pytest.approx(expected)


def test_k1_and_k3_average_to_the_true_divergence_over_the_anchors_own_samples():
    """Eight samples, drawn just as often as π_t says: the averages are the KL itself."""
    p = np.array([4, 2, 1, 1]) / 8
    q = np.array([0.1, 0.2, 0.3, 0.4])
    outcomes = np.repeat(np.arange(4), [4, 2, 1, 1])
    anchor, new = torch.tensor(np.log(p)[outcomes]), torch.tensor(np.log(q)[outcomes])
    x = LossInput(new, anchor, anchor, torch.ones(8), torch.arange(8), torch.zeros(8), torch.ones(8))
    result = diagnostics(
        {k: v.numpy() for k, v in evaluated("pmd", x, tau=1.0).per_sequence.items()},
        advantage=np.zeros(8),
        reward=np.zeros(8),
        group=np.zeros(8, int),
        baseline="mean",
        tau=1.0,
    )
    true = float(p @ np.log(p / q))
    assert result["pmd/kl_anchor_k1"] == pytest.approx(true)
    assert result["pmd/kl_anchor_k3"] == pytest.approx(true)


def test_a_rollout_of_512_groups_solves_each_multiset_of_rewards_once(monkeypatch):
    """Sixteen rewards of ±1 have 17 multisets: 17 root searches take milliseconds, 512 would not."""
    calls = []
    original = module.optimum_mean

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "optimum_mean", counted)
    rewards = np.random.default_rng(0).choice([-1.0, 1.0], 8192)
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(512), 16))
    targets(advantages(rewards, groups, baseline="mean", tau=0.1), rewards, groups, baseline="mean", tau=0.1)
    assert len(calls) <= 17


@pytest.mark.parametrize("length", [0, 11])
def test_arrays_of_another_length_are_refused_by_name(length):
    with pytest.raises(ValueError, match=f"has {length} entries for 12 sequences"):
        measure(np.zeros(length))


def test_a_step_without_sequences_is_refused():
    with pytest.raises(ValueError, match="0 entries for 0 sequences"):
        diagnostics(
            arrays(np.zeros(0)),
            advantage=[],
            reward=[],
            group=np.zeros(0, int),
            baseline="mean",
            tau=0.1,
        )


def test_an_iteration_takes_the_last_of_what_grows_and_the_mean_of_what_describes_the_rollout():
    first = dict.fromkeys(KEYS, 1.0) | {"loss": 9.0, "mismatch/max_abs": 7.0}
    last = dict.fromkeys(KEYS, 2.0) | {"loss": 9.0, "mismatch/max_abs": 3.0, "pmd/drift": 5.0}
    result = over_iteration([first, last | {"pmd/drift": 2.0}, last])
    mean = {"pmd/chi2_weight", "pmd/log_z_gap", "pmd/zero_advantage_groups"}
    mean |= {"mismatch/mean_abs", "mismatch/sequence_sum_abs", "mismatch/effective_sample_size"}
    sums = {f"pmd/fit/{name}" for name in SUMS}
    assert result.keys() == (KEYS - sums) | {"pmd/drift_per_step"}
    assert {k: result[k] for k in mean} == pytest.approx(dict.fromkeys(mean, 5 / 3))
    assert result["mismatch/max_abs"] == 7.0
    assert result["pmd/drift"] == 5.0 and result["pmd/drift_per_step"] == 2.0
    others = KEYS - mean - sums - {"mismatch/max_abs", "pmd/drift", "pmd/progress", "pmd/r2", SIGNAL}
    assert {k: result[k] for k in others} == dict.fromkeys(others, 2.0)
    assert over_iteration([]) == {}


def test_an_iterations_progress_and_r2_are_those_of_all_its_sequences_together():
    """Steps of one group, the last without a signal: the ratios of the three steps as if they were one."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=12)
    a = advantages(REWARDS, GROUPS, baseline="mean", tau=0.1)
    steps = [
        diagnostics(
            arrays(s[own]), advantage=a[own], reward=REWARDS[own], group=GROUPS[own], baseline="mean", tau=0.1
        )
        for own in np.split(np.arange(12), 3)
    ]
    together, iteration = measure(s), over_iteration(steps)
    assert "pmd/progress" not in steps[2] and together[SIGNAL] == iteration[SIGNAL] == 2
    for name in ("pmd/progress", "pmd/r2"):
        assert iteration[name] == pytest.approx(together[name]), name
    assert not {"pmd/progress", "pmd/r2"} & over_iteration(steps[2:]).keys()


def test_a_quantile_of_several_ranks_histograms_is_that_of_all_values_to_six_per_cent():
    values = np.abs(np.random.default_rng(0).standard_cauchy(20_000)) * 1e-3
    counts = np.sum([magnitude_histogram(part) for part in np.split(values, [100, 7000])], axis=0)
    for share in (0.5, 0.9, 0.99):
        exact = np.quantile(values, share)
        assert 0.999 * exact <= histogram_quantile(counts, share) <= 1.06 * exact
    assert histogram_quantile(magnitude_histogram([]), 0.99) == 0.0
    assert histogram_quantile(magnitude_histogram([0.0, 0.0]), 0.99) <= 1.07e-9


@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_of_several_taus_are_measured_as_each_alone(baseline):
    """Three groups with a τ each: targets, advantages and λ are those of three calls with one τ."""
    taus = np.repeat([0.1, 0.5, 2.0], 4)
    a = advantages(REWARDS, GROUPS, baseline=baseline, tau=taus)
    found, weights = targets(a, REWARDS, GROUPS, baseline=baseline, tau=taus)
    alone_weights = {}
    for group in (5, -2, 9):
        own = group == GROUPS
        tau = float(taus[own][0])
        assert a[own].tolist() == advantages(REWARDS[own], GROUPS[own], baseline=baseline, tau=tau).tolist()
        alone, weight = targets(a[own], REWARDS[own], GROUPS[own], baseline=baseline, tau=tau)
        assert found[own].tolist() == alone.tolist()
        alone_weights[group] = float(weight[0])
    assert weights.tolist() == [alone_weights[group] for group in (-2, 5, 9)]
    result = diagnostics(
        arrays(found), advantage=a, reward=REWARDS, group=GROUPS, baseline=baseline, tau=taus
    )
    assert result["pmd/progress"] == pytest.approx(1.0)
    assert result["pmd/chi2_weight"] == pytest.approx(np.mean(list(alone_weights.values())))


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_response_of_several_sequences_counts_once_in_its_groups_optimum(baseline):
    """An agent's episodes: their baseline is over episodes, so their optimum, λ and Z must be, too."""
    parts = np.array([3, 1, 1, 2, 1, 1, 1, 1, 4, 1, 1, 1])
    a = advantages(REWARDS, GROUPS, baseline=baseline, tau=0.1)
    target = a / 0.1
    if baseline.startswith("mean"):
        target = np.concatenate([group_target(own / 0.1)[0] for own in np.split(a, 3)])
    s, a, reward, group, response = (np.repeat(x, parts) for x in (target, a, REWARDS, GROUPS, np.arange(12)))
    result = diagnostics(
        arrays(s), advantage=a, reward=reward, group=group, response=response, baseline=baseline, tau=0.1
    )
    assert result["pmd/progress"] == pytest.approx(1)
    assert result["pmd/fit/target_square"] == pytest.approx((s**2).sum()), "every sequence is in the loss"
    whole = measure(target, baseline=baseline)
    for key in ("pmd/chi2_weight", "pmd/log_z_gap", "pmd/zero_advantage_groups", SIGNAL):
        assert result[key] == pytest.approx(whole[key]), key


def test_a_response_has_the_weights_of_all_its_sequences_towards_who_sampled():
    log_weight = np.random.default_rng(0).normal(size=12)
    of_group: dict = {"group": GROUPS, "baseline": "mean", "tau": 0.1}
    whole = stale_diagnostics(log_weight, reward=REWARDS, **of_group)
    parts, of_group["group"] = np.array([0.25, 0.75]), np.repeat(GROUPS, 2)
    split = stale_diagnostics(
        np.outer(log_weight, parts).ravel(),
        reward=np.repeat(REWARDS, 2),
        response=np.arange(24) // 2,
        **of_group,
    )
    assert split == pytest.approx(whole)


def test_samples_of_the_anchor_itself_have_its_own_chi2_weight_and_all_count():
    result = stale_diagnostics(np.zeros(12), reward=REWARDS, group=GROUPS, baseline="mean", tau=0.1)
    assert result["stale/effective_sample_size"] == pytest.approx(1)
    assert result["stale/chi2_weight"] == pytest.approx(measure(np.zeros(12))["pmd/chi2_weight"])


@pytest.mark.parametrize(("tau", "nu"), [(0.1, 1.009), (1.0, 0.135)])
def test_older_samples_have_the_chi2_weight_of_the_closed_forms_table(tau, nu):
    """docs/algorithm.md: success 0.3 under π_t, 0.1 under the policy that sampled; here 1 sample in 10."""
    reward, group = np.array([1.0] + [0.0] * 9), np.zeros(10, int)
    weight = np.where(reward == 1, 0.3 / 0.1, 0.7 / 0.9)
    result = stale_diagnostics(np.log(weight), reward=reward, group=group, baseline="mean", tau=tau)
    assert result["stale/chi2_weight"] == pytest.approx(nu, abs=1e-3)
    effective = weight.sum() ** 2 / (10 * (weight**2).sum())
    assert result["stale/effective_sample_size"] == pytest.approx(effective)


def test_a_partition_baseline_has_no_chi2_weight_towards_who_sampled():
    result = stale_diagnostics(np.zeros(12), reward=REWARDS, group=GROUPS, baseline="partition", tau=0.1)
    assert set(result) == {"stale/effective_sample_size"}
