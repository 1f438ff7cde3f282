"""What a step tells about its subproblem: how far it is solved, how far π_θ is from π_t, and π_t from π_b."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_pmd.algorithm.baselines import Floats, Indices, advantages, rows_by_size
from megatron_pmd.algorithm.closed_form import optimum_mean
from megatron_pmd.algorithm.stale_optimum import optimum_of_stale_samples

OF_THE_ROLLOUT = frozenset({"pmd/chi2_weight", "pmd/log_z_gap", "pmd/zero_advantage_groups"})
"""Diagnostics that do not depend on the policy being trained."""
LEAST_LOG_WEIGHT = -50.0
"""Of a sequence beside the largest of its group: a probability of 0 has no ratio."""
RATIOS = {
    "pmd/progress": ("pmd/fit/towards_target", "pmd/fit/target_square"),
    "pmd/r2": ("pmd/fit/explained_square", "pmd/fit/advantage_square"),
}
"""Diagnostic -> numerator and denominator: sums over sequences, which several steps add up."""


def diagnostics(
    per_sequence: Mapping[str, ArrayLike],
    *,
    advantage: ArrayLike,
    reward: ArrayLike,
    group: ArrayLike,
    baseline: str,
    tau: ArrayLike,
    response: ArrayLike | None = None,
) -> dict[str, float]:
    """One optimizer step's diagnostics, over all its micro-batches and data-parallel ranks.

    per_sequence      LossTerms.per_sequence of every micro-batch, concatenated: arrays [sequences]
    advantage, reward [sequences] in reward units, in the same order
    group             [sequences] integer label of the sequence's prompt; every group whole
    baseline, tau     as given to baselines.advantages
    response          [sequences] integer label of the response that the sequence is a part of, whose reward
                      and advantage it has; None: each is one

    A group's optimum, its λ and its Z are over responses, as its baseline is: each counts once, and all of
    its sequences have its s*. All other values are over sequences, as the loss is.

    Returns (N sequences; "per token" divides the sum by the counted tokens of the step):

    pmd/progress              Σ s s* / Σ s*²: 0 at π_t, 1 when solved; absent if every s* is 0
    pmd/r2                    1 − Σ (s − A/τ)² / Σ (A/τ)²: 0 at π_t; absent if every advantage is 0
    pmd/fit/…                 numerators and denominators of the two, see RATIOS
    pmd/groups_with_signal    groups in which not every advantage is 0
    pmd/kl_anchor_k1, k2, k3  KL(π_t ‖ π_θ), nats per sequence; with /per_token appended: nats per token
    pmd/chi2_weight           λ, mean over groups; 0 for the partition baselines, which have no χ² term
    pmd/log_z_gap             τ log Z of the group's samples − their mean reward, mean over groups; ≥ 0
    pmd/log_ratio_p05, p50, p95        quantiles of s
    pmd/drift                 mean |s|, nats: how far the steps before this one moved responses it has not
    seen
    pmd/zero_advantage_groups          share of groups in which every advantage is 0
    mismatch/mean_abs, max_abs         |log π_t − log π_b| per token
    mismatch/sequence_sum_abs          |Σ (log π_t − log π_b)|, mean over sequences
    mismatch/effective_sample_size     (Σ w)² / (N Σ w²), between 0 and 1, of the loss's weights w

    Sequences without a counted token are left out of progress and r2: nothing can move them.
    Raises ValueError for arrays of different lengths or for none at all.
    Source: docs/algorithm.md, "What to watch in a run".
    """
    values = {name: np.asarray(value, dtype=np.float64) for name, value in per_sequence.items()}
    tau = np.asarray(tau, np.float64)
    a, r, labels = np.asarray(advantage, np.float64), np.asarray(reward, np.float64), np.asarray(group)
    _refuse_other_lengths(values | {"advantage": a, "reward": r}, len(labels))
    first, of_response = _responses(response, len(labels))
    of_responses = a[first], r[first], labels[first]
    taus = np.broadcast_to(tau, labels.shape)[first]
    target, chi2_weights = targets(*of_responses, baseline=baseline, tau=taus)
    s = values["log_ratio"]
    return {
        **_fit(s, target[of_response], a / tau, values["length"] > 0),
        "pmd/chi2_weight": float(chi2_weights.mean()),
        **_groups(*of_responses, taus),
        **_movement(values),
        **_mismatch(values),
    }


def _movement(values: Mapping[str, Floats]) -> dict[str, float]:
    s, tokens = values["log_ratio"], values["length"].sum()
    quantiles = np.quantile(s, [0.05, 0.5, 0.95])
    result = {f"pmd/log_ratio_p{p}": float(q) for p, q in zip(("05", "50", "95"), quantiles, strict=True)}
    result["pmd/drift"] = float(np.abs(s).mean())
    for name, estimate in (("k1", -s), ("k2", values["kl_k2"]), ("k3", values["kl_k3"])):
        result[f"pmd/kl_anchor_{name}"] = float(estimate.mean())
        result[f"pmd/kl_anchor_{name}/per_token"] = _ratio(estimate.sum(), tokens)
    return result


def _refuse_other_lengths(arrays: Mapping[str, Floats], sequences: int) -> None:
    for name, values in arrays.items():
        if len(values) != sequences or not sequences:
            raise ValueError(
                f"{name} has {len(values)} entries for {sequences} sequences: one for each is needed"
            )


def _responses(labels: ArrayLike | None, sequences: int) -> tuple[Indices, Indices]:
    """(the first sequence of each response, which response each sequence is of)."""
    given = np.arange(sequences) if labels is None else np.asarray(labels)
    _, first, inverse = np.unique(given, return_index=True, return_inverse=True)
    return first, inverse


def over_iteration(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """An iteration's diagnostics from those of its optimizer steps, first to last.

    What grows with the steps is taken from the last one; means over the steps are what describes the rollout;
    of mismatch/max_abs it is the largest. A step has few groups with a signal, or none: pmd/progress and
    pmd/r2 are ratios of sums over all steps, absent where no step has a signal, and
    pmd/groups_with_signal is summed. pmd/drift_per_step is the growth of pmd/drift from the first
    step to
    the last, over the steps in between; it needs two steps. Returns {} for no steps.
    """
    if not steps:
        return {}
    result: dict[str, float] = {}
    for key, last in steps[-1].items():
        if key in RATIOS or key.startswith("pmd/fit/"):
            continue
        if key == "mismatch/max_abs":
            result[key] = max(step[key] for step in steps)
        elif key == "pmd/groups_with_signal":
            result[key] = sum(step[key] for step in steps)
        elif key.startswith("mismatch/") or key in OF_THE_ROLLOUT:
            result[key] = float(np.mean([step[key] for step in steps]))
        elif key.startswith("pmd/"):
            result[key] = last
    if "pmd/groups_with_signal" in result:
        sums = {part: sum(step[part] for step in steps) for parts in RATIOS.values() for part in parts}
        result |= _ratios(sums)
    if len(steps) > 1 and "pmd/drift" in result:
        result["pmd/drift_per_step"] = (steps[-1]["pmd/drift"] - steps[0]["pmd/drift"]) / (len(steps) - 1)
    return result


HISTOGRAM_EDGES = np.logspace(-9, 2, 11 * 40 + 1)
"""40 bins a decade: a quantile read from them is at most 6 % too large."""


def magnitude_histogram(values: ArrayLike) -> NDArray[np.int64]:
    """How many |values| lie in each bin of HISTOGRAM_EDGES; what is beyond counts in the outermost bin.

    Histograms of several ranks add up, quantiles do not.
    """
    inside = np.clip(np.abs(np.asarray(values, np.float64)), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return np.histogram(inside, HISTOGRAM_EDGES)[0]


def histogram_quantile(counts: NDArray[np.int64], share: float) -> float:
    """Upper edge of the bin in which the `share`-quantile of the counted magnitudes lies; 0 for no values."""
    if not counts.sum():
        return 0.0
    return float(HISTOGRAM_EDGES[1 + np.searchsorted(counts.cumsum(), share * counts.sum())])


def targets(
    advantage: Floats, reward: Floats, group: NDArray[np.generic], *, baseline: str, tau: ArrayLike
) -> tuple[Floats, Floats]:
    """The log-ratio s* [sequences] each sequence would have at its group's optimum, and λ [groups] in nats.

    Partition baselines: A/τ, and λ = 0. Mean baselines: log ρ* of closed_form.optimum_mean for the group's
    empirical distribution, uniform over its K samples; with `mean_loo` rewards count K/(K−1) times, as they
    do in its advantages.
    """
    tau = np.broadcast_to(np.asarray(tau, np.float64), advantage.shape)
    if not baseline.startswith("mean"):
        return advantage / tau, np.zeros(len(np.unique(group)))
    result = np.zeros_like(reward)
    weights = []
    for rows in rows_by_size(group):
        size = rows.shape[1]
        scale = size / (size - 1) if baseline == "mean_loo" else 1.0
        order = np.argsort(reward[rows], axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        # Rewards come from a short list (±1), so few groups differ: solve each multiset of rewards once.
        problems = np.concatenate([tau[rows[:, :1]], reward[rows] * scale], axis=1)
        distinct, inverse = np.unique(problems, axis=0, return_inverse=True)
        solved = [_group_optimum(multiset, float(strength)) for strength, *multiset in distinct]
        inverse = inverse.reshape(-1)
        result[rows] = np.stack([log_rho for log_rho, _ in solved])[inverse]
        weights.append(np.array([chi2_weight for _, chi2_weight in solved])[inverse])
    return result, np.concatenate(weights)


def _group_optimum(rewards: Sequence[float], tau: float) -> tuple[Floats, float]:
    outcomes, inverse, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    log_rho, chi2_weight = optimum_mean(outcomes, counts / counts.sum(), tau)
    return log_rho[inverse], chi2_weight


def _fit(s: Floats, target: Floats, scaled_advantage: Floats, counted: NDArray[np.bool_]) -> dict[str, float]:
    s, target, scaled_advantage = s[counted], target[counted], scaled_advantage[counted]
    total = (scaled_advantage**2).sum()
    sums = {
        "pmd/fit/towards_target": float((s * target).sum()),
        "pmd/fit/target_square": float((target**2).sum()),
        "pmd/fit/explained_square": float(total - ((s - scaled_advantage) ** 2).sum()),
        "pmd/fit/advantage_square": float(total),
    }
    return sums | _ratios(sums)


def _ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """Those of RATIOS whose denominator is not 0."""
    return {name: sums[over] / sums[under] for name, (over, under) in RATIOS.items() if sums[under] > 0}


def _mismatch(values: Mapping[str, Floats]) -> dict[str, float]:
    weight = values["weight"]
    return {
        "mismatch/mean_abs": _ratio(values["mismatch_abs_sum"].sum(), values["length"].sum()),
        "mismatch/max_abs": float(values["mismatch_abs_max"].max()),
        "mismatch/sequence_sum_abs": float(np.abs(values["mismatch_sum"]).mean()),
        "mismatch/effective_sample_size": _ratio(weight.sum() ** 2, len(weight) * (weight**2).sum()),
    }


def _groups(advantage: Floats, reward: Floats, group: NDArray[np.generic], tau: Floats) -> dict[str, float]:
    mean = advantages(reward, group, baseline="mean", tau=tau)
    partition = advantages(reward, group, baseline="partition", tau=tau)
    gaps, zero = [], []
    for rows in rows_by_size(group):
        gaps.append((mean - partition)[rows[:, 0]])
        zero.append((advantage[rows] == 0).all(axis=1))
    return {
        "pmd/log_z_gap": float(np.maximum(np.concatenate(gaps), 0.0).mean()),
        "pmd/zero_advantage_groups": float(np.concatenate(zero).mean()),
        "pmd/groups_with_signal": float((~np.concatenate(zero)).sum()),
    }


def stale_diagnostics(
    log_weight: ArrayLike,
    *,
    reward: ArrayLike,
    group: ArrayLike,
    baseline: str,
    tau: ArrayLike,
    response: ArrayLike | None = None,
) -> dict[str, float]:
    """How far older policies π_b, which sampled, are from π_t; of one optimizer step, as diagnostics().

    log_weight        [sequences] Σ log π_t − log π_b over each sequence's counted tokens, nats
    others            as in diagnostics()

    stale/effective_sample_size  (Σ w)² / (N Σ w²) of w = π_t/π_b, between 0 and 1
    stale/chi2_weight            ν, mean over groups: the weight of the implicit χ² penalty against π_b, nats
    (stale_optimum.py); mean baselines alone

    N and K count responses: a response has the weights of all its sequences, multiplied. A group's responses
    stand for π_b, each 1/K of it. π_t is theirs by their weights, which add up to 1.
    """
    reward, group = np.asarray(reward, np.float64), np.asarray(group)
    first, of_response = _responses(response, len(group))
    tau = np.broadcast_to(np.asarray(tau, np.float64), reward.shape)[first]
    log_weight, reward, group = np.bincount(of_response, log_weight), reward[first], group[first]
    weight = np.exp(log_weight - log_weight.max())
    values = {"stale/effective_sample_size": _ratio(weight.sum() ** 2, len(weight) * (weight**2).sum())}
    if not baseline.startswith("mean"):
        return values
    found = []
    for rows in rows_by_size(group):
        size = rows.shape[1]
        scale = size / (size - 1) if baseline == "mean_loo" else 1.0
        for row in rows:
            anchor = np.exp(np.maximum(log_weight[row] - log_weight[row].max(), LEAST_LOG_WEIGHT))
            if np.ptp(reward[row]) == 0:
                found.append(0.0)
                continue
            rewards, uniform = reward[row] * scale, np.full(size, 1 / size)
            optimum = optimum_of_stale_samples(rewards, uniform, anchor / anchor.sum(), float(tau[row[0]]))
            found.append(optimum[1])
    return values | {"stale/chi2_weight": float(np.mean(found))}


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else 0.0
