"""Where PMD-mean converges to when an older policy sampled: the population optimum of a stale subproblem.

Three policies: b sampled, the anchor a = π_t is the policy when the update begins, and π is fitted. As in
closed_form.py an outcome is one response, and a policy is written as its ratio to the anchor, ρ = π/a.
Source: docs/algorithm.md, "Samples of an older policy".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import lambertw, wrightomega

from megatron_pmd.algorithm.closed_form import Floats, checked

END_OF_BRANCH = float(np.nextafter(-np.exp(-1.0), 0.0))
"""The least argument for which W is real, where both of its branches end; scipy's is NaN one digit below."""
GRID = np.geomspace(1.0, 1e-14, 200)[:, None]
"""Where stationary points with one outcome on W's other branch are looked for, in parts of the lowest ν."""


def optimum_of_stale_samples(
    rewards: ArrayLike, sampled: ArrayLike, anchor: ArrayLike, tau: float, *, baseline: float | None = None
) -> tuple[Floats, float]:
    """The minimiser of ½ E_b[(log ρ − A/τ)²] over all distributions, with A = r − E_b[r].

    rewards          [outcomes]  in reward units
    sampled, anchor  [outcomes]  probabilities of b and of a; each sum to 1, and none is 0
    tau              regularisation strength τ > 0, in reward units
    baseline         in place of E_b[r], in reward units. Samples of b that are weighed by a/b count as those
                     of a, and keep the mean reward of b's groups: sampled=a, baseline=E_b[r]

    Returns log ρ* [outcomes] in nats, and ν in nats: π* maximises E_π[r] − τ KL(π ‖ a) − (ντ/2) χ²(π ‖ b).
    ν = KL(b ‖ π*) − KL(b ‖ a) + E_b[A]/τ; the last is 0 unless a baseline is given. ν < 0 where b was the
    better policy. With b = a it is `optimum_mean`, and ν its λ. Raises ValueError for values outside these
    ranges.

    Stationarity, with w = a/b: log ρ + ν w ρ = A/τ, so ρ = W(ν w e^{A/τ}) / (ν w), and ν solves E_a[ρ] = 1.
    A minimum has at most one outcome on W's other branch. There may be several stationary points: of all,
    the one with the smallest loss is taken.
    """
    r, b = checked(rewards, sampled, tau)
    _, a = checked(rewards, anchor, tau)
    if b.min() <= 0 or a.min() <= 0:
        raise ValueError("an outcome of probability 0 has no ratio of the anchor to the policy that sampled")
    target = (r - (b @ r if baseline is None else baseline)) / tau
    scale = np.log(a) - np.log(b) + target  # log(w e^{A/τ})
    return min(_stationary(target, scale, a), key=lambda point: float(b @ (point[0] - target) ** 2))


def _stationary(target: Floats, scale: Floats, a: Floats) -> Iterator[tuple[Floats, float]]:
    """(log ρ, ν) where all outcomes are on W's principal branch, and where one is on the other.

    target: A/τ, scale: log(w e^{A/τ}).
    """
    from scipy.optimize import brentq  # half a second of imports that only the driver needs

    def log_rho(nu: float, other: int | None) -> Floats:
        found = _principal(target, scale, np.asarray(nu))
        if other is not None:
            found[other] = _other(target, scale, np.asarray(nu))[other]
        return found

    def excess(nu: float, other: int | None = None) -> float:
        with np.errstate(over="ignore"):
            return float(np.log(a @ np.exp(log_rho(nu, other))))

    def root(low: float, high: float, other: int | None = None) -> tuple[Floats, float]:
        nu = float(brentq(lambda x: excess(x, other), low, high, xtol=1e-300, rtol=1e-14))
        return log_rho(nu, other), nu

    # The principal branch ends here for the outcome with the largest scale. Up to there excess falls with ν.
    lowest = END_OF_BRANCH * float(np.exp(-scale.max()))
    if excess(lowest) >= 0:
        high = 1.0
        while excess(high) > 0:
            high *= 4
        yield root(lowest, high)
    else:
        last, high = int(np.argmax(scale)), lowest / 2
        while excess(high, last) < 0:
            high /= 2
        yield root(lowest, high, last)
    grid = lowest * GRID
    with np.errstate(over="ignore"):
        principal = a * np.exp(_principal(target, scale, grid))
        whole = principal.sum(axis=1, keepdims=True) - principal + a * np.exp(_other(target, scale, grid))
    below = whole < 1
    for cell, other in zip(*np.nonzero(below[1:] != below[:-1]), strict=True):
        yield root(float(grid[cell, 0]), float(grid[cell + 1, 0]), int(other))


def _principal(target: Floats, scale: Floats, nu: Floats) -> Floats:
    """The root x of x + ν w eˣ = A/τ on W's principal branch; nu: one for all, or [values, 1]."""
    if nu.ndim == 0 and nu > 0:
        return target - wrightomega(scale + np.log(nu))
    return target - lambertw(_argument(scale, nu)).real


def _other(target: Floats, scale: Floats, nu: Floats) -> Floats:
    """The same on the branch where ρ grows without bound as ν comes to 0; ν < 0."""
    return target - lambertw(_argument(scale, nu), -1).real


def _argument(scale: Floats, nu: Floats) -> Floats:
    with np.errstate(divide="ignore"):  # ν = 0
        return np.maximum(-np.exp(scale + np.log(-nu)), END_OF_BRANCH)
