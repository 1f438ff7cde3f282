"""Where the two PMD variants converge to: the population optimum of one subproblem over the whole simplex.

Everything is written in ρ = π/π_t, the ratio of a policy to the anchor, and returned as log ρ. An outcome is
one response; `probabilities` are those of the anchor π_t. Source: arXiv 2602.05933; docs/algorithm.md, "What
the two variants converge to".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, wrightomega

Floats = NDArray[np.float64]


def optimum_partition(rewards: ArrayLike, probabilities: ArrayLike, tau: float) -> Floats:
    """log ρ* = r/τ − log E_{π_t}[exp(r/τ)]: the solution of the KL-regularised subproblem.

    rewards        [outcomes]  in reward units
    probabilities  [outcomes]  of the anchor π_t; sum to 1
    tau            regularisation strength τ > 0, in reward units

    Returns log ρ* [outcomes], in nats. Raises ValueError for values outside these ranges.
    """
    r, p = checked(rewards, probabilities, tau)
    return (r - log_partition(r, p, tau)) / tau


def log_partition(rewards: ArrayLike, probabilities: ArrayLike, tau: float) -> float:
    """τ log Z = τ log E_{π_t}[exp(r/τ)], in reward units; arguments as for `optimum_partition`."""
    r, p = checked(rewards, probabilities, tau)
    top = r[p > 0].max()
    return float(top + tau * logsumexp((r - top)[p > 0] / tau, b=p[p > 0]))


def optimum_teacher(
    rewards: ArrayLike, probabilities: ArrayLike, teacher: ArrayLike, tau: float, weight: float
) -> Floats:
    """log ρ* of π* ∝ π_t^(1−β) π_T^β e^(r/τ): `optimum_partition` of r + τ β d with d = log π_T − log π_t.

    teacher   [outcomes]  probabilities of the teacher π_T; sum to 1, and none is 0 where π_t is not
    weight    β; the others as for `optimum_partition`

    With β = 1 and equal rewards π* is the teacher, with β = 0 it is plain PMD's. ValueError as there.
    """
    r, p = checked(rewards, probabilities, tau)
    _, q = checked(rewards, teacher, tau)
    if (q[p > 0] == 0).any():
        raise ValueError(f"the teacher must give every outcome of the anchor a probability, got {q}")
    log_ratio = np.zeros_like(r)
    np.log(q / np.where(p > 0, p, 1.0), out=log_ratio, where=p > 0)
    return optimum_partition(r + tau * weight * log_ratio, p, tau)


def optimum_mean(rewards: ArrayLike, probabilities: ArrayLike, tau: float) -> tuple[Floats, float]:
    """The minimiser of ½ E_{π_t}[(log ρ − A/τ)²] with A = r − E_{π_t}[r]: ρ* = W(λ e^{A/τ})/λ.

    Arguments as for `optimum_partition`. Returns log ρ* [outcomes] in nats, and λ = KL(π_t ‖ π*) ≥ 0 in nats,
    the weight of the implicit χ² penalty in units of τ/2. Equal rewards give (zeros, 0).

    λ solves E_{π_t}[ρ] = 1. With x = log ρ = A/τ − λρ and E[A] = 0 that reads E[eˣ − 1 − x] = E[λρ]. Both
    sides are sums of positive terms: their logarithms lose no digits, neither at λ ~ 1e-13 nor at A/τ ~ 1e4.
    """
    from scipy.optimize import brentq  # half a second of imports that only the driver needs

    r, p = checked(rewards, probabilities, tau)
    support = p > 0
    p_s, r_s = p[support], r[support]
    centre = r_s.max() + p_s @ (r_s - r_s.max())
    scaled = (r - centre) / tau
    a, log_p = scaled[support], np.log(p_s)
    if np.abs(a).max() < 1e-100:  # equal rewards, or so nearly that λ = Var[a]/2 underflows
        return scaled, 0.0

    def imbalance(log_lambda: float) -> float:
        x = _log_rho(a, log_lambda)
        return _log_sum(log_p + _log_excess(x)) - _log_sum(log_p + x) - log_lambda

    # ω(z) ≤ max(1, z), so E[ρ] ≤ 1 as soon as λ ≥ max(1, a + log λ) for the largest a.
    high = float(np.log(1.6 * max(a.max(), 0.0) + 1.0)) + 1e-9
    low = high - 2.0
    while imbalance(low) < 0:
        low = high - 4 * (high - low)
    log_lambda = float(brentq(imbalance, low, high, xtol=1e-14, rtol=1e-14))
    return _log_rho(scaled, log_lambda), float(np.exp(log_lambda))


def chi2(log_rho: ArrayLike, probabilities: ArrayLike) -> float:
    """χ²(π ‖ π_t) = E_{π_t}[(ρ − 1)²]; log_rho and probabilities [outcomes]."""
    return float(np.asarray(probabilities, np.float64) @ np.expm1(np.asarray(log_rho, np.float64)) ** 2)


def kl(log_rho: ArrayLike, probabilities: ArrayLike) -> float:
    """KL(π ‖ π_t) = E_{π_t}[ρ log ρ], in nats; log_rho and probabilities [outcomes]."""
    x = np.asarray(log_rho, np.float64)
    return float(np.asarray(probabilities, np.float64) @ (np.exp(x) * x))


def kl_of_anchor(log_rho: ArrayLike, probabilities: ArrayLike) -> float:
    """KL(π_t ‖ π) = −E_{π_t}[log ρ], in nats; log_rho and probabilities [outcomes]."""
    return float(-(np.asarray(probabilities, np.float64) @ np.asarray(log_rho, np.float64)))


def mixed_objective(
    log_rho: ArrayLike, rewards: ArrayLike, probabilities: ArrayLike, tau: float, chi2_weight: float
) -> float:
    """E_π[r] − τ KL(π ‖ π_t) − (λτ/2) χ²(π ‖ π_t), in reward units, with λ = `chi2_weight`.

    With λ from `optimum_mean` its maximiser over the simplex is the ρ* of `optimum_mean`; with λ = 0 it is
    that of `optimum_partition`, and the maximum is τ log Z.
    """
    r, p = checked(rewards, probabilities, tau)
    gain = float(p @ (np.exp(np.asarray(log_rho, np.float64)) * r))
    return gain - tau * kl(log_rho, p) - 0.5 * chi2_weight * tau * chi2(log_rho, p)


def _log_rho(a: Floats, log_lambda: float) -> Floats:
    """The root x of x + λeˣ = a, for each a = A/τ: x = a − W(λeᵃ), W(e^z) the Wright omega function of z."""
    z = a + log_lambda
    omega = wrightomega(z)
    # For large z, a − ω cancels and log(ω/λ) keeps its digits; for negative z, ω is a small correction to a.
    return np.where(z > 0, np.log(np.maximum(omega, 0.5)) - log_lambda, a - omega)


def _log_excess(x: Floats) -> Floats:
    """log(eˣ − 1 − x), to full relative precision for every x; −inf at x = 0."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # Around 0 the first two terms of eˣ cancel against 1 + x; above 1 eˣ itself may overflow.
        series = np.log(x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
        direct = np.log(np.expm1(np.minimum(x, 1.0)) - np.minimum(x, 1.0))
        above = x + np.log1p(-(1 + x) * np.exp(-np.maximum(x, 1.0)))
    return np.where(np.abs(x) < 1e-2, series, np.where(x < 1, direct, above))


def _log_sum(terms: Floats) -> float:
    """logsumexp of a short vector; scipy's costs ten times as much a call, which a root search multiplies."""
    top = terms.max()
    return float(top + np.log(np.exp(terms - top).sum()))


def checked(rewards: ArrayLike, probabilities: ArrayLike, tau: float) -> tuple[Floats, Floats]:
    """Both as float64 [outcomes], probabilities summing to 1 to the last digit; ValueError out of range."""
    r, p = np.asarray(rewards, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if r.ndim != 1 or r.shape != p.shape or not r.size:
        raise ValueError(f"rewards {r.shape} and probabilities {p.shape}: one of each for every outcome")
    if not np.isfinite(r).all():
        raise ValueError(f"rewards must be finite, got {r}")
    if not (p >= 0).all() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"probabilities must be non-negative and sum to 1, got a sum of {p.sum()}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return r, p / p.sum()
