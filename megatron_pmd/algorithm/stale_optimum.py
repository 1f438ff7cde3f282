"""Where PMD-mean converges to when an older policy sampled: the population optimum of a stale subproblem.

Three policies: b sampled, the anchor a = π_t is the policy when the update begins, and π is fitted. As in
closed_form.py an outcome is one response, and a policy is written as its ratio to the anchor, ρ = π/a.
Source: docs/algorithm.md, "Samples of an older policy".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import lambertw, wrightomega

from megatron_pmd.algorithm.closed_form import Floats, checked

END_OF_BRANCH = float(np.nextafter(-np.exp(-1.0), 0.0))
"""The least argument for which W is real, where both of its branches end; scipy's is NaN one digit below."""


def optimum_of_stale_samples(
    rewards: ArrayLike, sampled: ArrayLike, anchor: ArrayLike, tau: float
) -> tuple[Floats, float]:
    """The minimiser of ½ E_b[(log ρ − A/τ)²] over all distributions, with A = r − E_b[r].

    rewards          [outcomes]  in reward units
    sampled, anchor  [outcomes]  probabilities of b and of a; each sum to 1, and none is 0
    tau              regularisation strength τ > 0, in reward units

    Returns log ρ* [outcomes] in nats, and ν = KL(b ‖ π*) − KL(b ‖ a) in nats: π* maximises
    E_π[r] − τ KL(π ‖ a) − (ντ/2) χ²(π ‖ b). ν < 0 where b was the better policy. With b = a it is
    `optimum_mean`, and ν its λ. Raises ValueError for values outside these ranges.

    Stationarity, with w = a/b: log ρ + ν w ρ = A/τ, so ρ = W(ν w e^{A/τ}) / (ν w), and ν solves E_a[ρ] = 1.
    """
    from scipy.optimize import brentq  # half a second of imports that only the driver needs

    r, b = checked(rewards, sampled, tau)
    _, a = checked(rewards, anchor, tau)
    if b.min() <= 0 or a.min() <= 0:
        raise ValueError("an outcome of probability 0 has no ratio of the anchor to the policy that sampled")
    target = (r - b @ r) / tau
    scale = np.log(a) - np.log(b) + target  # log(w e^{A/τ})
    last = int(np.argmax(scale))
    # The principal branch ends for this outcome first. Beyond, it alone is on the other branch, where its ρ
    # grows without bound as ν comes back to 0.
    lowest = END_OF_BRANCH * float(np.exp(-scale[last]))

    def log_rho(nu: float, *, other_branch: bool) -> Floats:
        found = _log_rho(target, scale, nu)
        if other_branch:
            found[last] = target[last] - lambertw(max(nu * np.exp(scale[last]), END_OF_BRANCH), -1).real
        return found

    def excess(nu: float, *, other_branch: bool = False) -> float:
        with np.errstate(over="ignore"):
            return float(np.log(a @ np.exp(log_rho(nu, other_branch=other_branch))))

    other_branch = excess(lowest) < 0
    if other_branch:
        low, high = lowest, lowest / 2
        while excess(high, other_branch=True) < 0:
            high /= 2
    else:
        low, high = lowest, 1.0
        while excess(high) > 0:
            high *= 4
    nu = float(brentq(lambda x: excess(x, other_branch=other_branch), low, high, xtol=1e-300, rtol=1e-14))
    return log_rho(nu, other_branch=other_branch), nu


def _log_rho(target: Floats, scale: Floats, nu: float) -> Floats:
    """The root x of x + ν w eˣ = A/τ on W's principal branch; target: A/τ, scale: log(w e^{A/τ})."""
    if nu > 0:
        return target - wrightomega(scale + np.log(nu))
    argument = -np.exp(scale + np.log(-nu)) if nu else np.zeros_like(scale)
    return target - lambertw(np.maximum(argument, END_OF_BRANCH)).real
