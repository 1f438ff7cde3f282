"""What K samples of a group do to the two PMD variants: a bandit with known π_t, solved exactly.

    python -m tools.studies.finite_sample [--output docs/images/finite_sample.png]

A prompt with two outcomes, success (reward 1, probability p under π_t) and failure (reward 0), stands for a
binary grader. Each of many groups draws K responses, takes its baseline from them, and the regression
Σ_i (log ρ(y_i) − A_i/τ)² is solved to its minimum over all policies. The error is the distance of the success
probability that results from that of the variant's own population optimum (algorithm/closed_form.py).

A baseline's own error, in reward units, is also shown for rewards that are normally distributed: there
τ log Z = σ²/(2τ) hangs on the largest rewards, which K samples do not contain. Takes about half a minute.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from scipy.optimize.elementwise import find_root
from scipy.special import expit

from megatron_pmd.algorithm.baselines import BASELINES, Floats, advantages
from megatron_pmd.algorithm.closed_form import log_partition, optimum_mean, optimum_partition
from tools.studies.pictures import save

GROUPS = 4000
SIZES = (2, 4, 8, 16, 32, 64, 128)
TAUS = (0.01, 0.03, 0.1, 0.3, 1.0)
SUCCESS = 0.1
"""Of a response of π_t."""
DEVIATION = 0.3
"""σ of the normally distributed rewards."""
COLOURS = {"mean": "#1f5fa8", "mean_loo": "#7fb2e5", "partition": "#b5471d", "partition_loo": "#eba07d"}


@dataclass(frozen=True)
class Point:
    """Averages over the groups of one size, τ and baseline."""

    policy_error: float
    """Mean |q − q*| of the success probability after the regression."""
    baseline_error: float
    """Root mean square of b − b*, binary rewards."""
    baseline_error_normal: float
    """The same, normally distributed rewards."""


def solve(successes: Floats, size: int, target_success: Floats, target_failure: Floats) -> Floats:
    """Success probability of the policy that minimises the regression of each group, exactly.

    With q = σ(u): log ρ of a success is log(q/p), of a failure log((1−q)/(1−p)); the derivative by u of
    n_s (log ρ_s − t_s)²/2 + n_f (log ρ_f − t_f)²/2 has one sign change. Groups of one outcome are at π_t.
    """

    def slope(u: Floats, n: Floats, ts: Floats, tf: Floats) -> Floats:
        log_q, log_rest = -np.logaddexp(0, -u), -np.logaddexp(0, u)
        success = n * (log_q - np.log(SUCCESS) - ts) * expit(-u)
        failure = (size - n) * (log_rest - np.log1p(-SUCCESS) - tf) * expit(u)
        return success - failure

    q = np.full(len(successes), SUCCESS)
    mixed = (successes > 0) & (successes < size)
    given = (successes[mixed], target_success[mixed], target_failure[mixed])
    if mixed.any():
        # σ(±u) underflows beyond ±700; the slope's sign is settled long before
        root = find_root(slope, (np.full(mixed.sum(), -600.0), np.full(mixed.sum(), 600.0)), args=given)
        q[mixed] = expit(root.x)
    return q


def measure(size: int, tau: float, baseline: str, rng: np.random.Generator) -> Point:
    """One point of the study."""
    labels = np.repeat(np.arange(GROUPS), size)
    rewards = (rng.random((GROUPS, size)) < SUCCESS).astype(np.float64)
    values = advantages(rewards.reshape(-1), labels, baseline=baseline, tau=tau).reshape(GROUPS, size)
    successes = rewards.sum(axis=1)
    # within a group all successes have one advantage, and so have all failures
    success = np.where(rewards == 1, values, -np.inf).max(axis=1) / tau
    failure = np.where(rewards == 0, values, -np.inf).max(axis=1) / tau
    q = solve(successes, size, success, failure)
    outcomes, chances = [1.0, 0.0], [SUCCESS, 1 - SUCCESS]
    partition = baseline.startswith("partition")
    log_rho = (
        optimum_partition(outcomes, chances, tau) if partition else optimum_mean(outcomes, chances, tau)[0]
    )
    best = log_partition(outcomes, chances, tau) if partition else SUCCESS

    normal = DEVIATION * rng.standard_normal((GROUPS, size))
    used = normal - advantages(normal.reshape(-1), labels, baseline=baseline, tau=tau).reshape(GROUPS, size)
    best_normal = DEVIATION**2 / (2 * tau) if partition else 0.0
    return Point(
        policy_error=float(np.abs(q - SUCCESS * np.exp(log_rho[0])).mean()),
        baseline_error=float(np.sqrt(((rewards - values - best) ** 2).mean())),
        baseline_error_normal=float(np.sqrt(((used - best_normal) ** 2).mean())),
    )


def _optimum_mean(rewards: list[float], chances: list[float], tau: float) -> Floats:
    log_rho, _ = optimum_mean(rewards, chances, tau)
    return log_rho


def study(seed: int = 0) -> dict[tuple[str, float, int], Point]:
    """Every point, by baseline, τ and K."""
    rng = np.random.default_rng(seed)
    return {
        (baseline, tau, size): measure(size, tau, baseline, rng)
        for baseline in BASELINES
        for tau in TAUS
        for size in SIZES
    }


def draw(points: dict[tuple[str, float, int], Point], path: Path) -> None:
    rows = {
        "policy_error": "error of the success\nprobability",
        "baseline_error": "error of the baseline,\nbinary rewards",
        "baseline_error_normal": f"error of the baseline,\nnormal rewards, σ = {DEVIATION:g}",
    }
    figure, axes = plt.subplots(
        len(rows), len(TAUS), figsize=(3 * len(TAUS), 8), sharex=True, sharey="row", layout="constrained"
    )
    for (name, title), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(title)
        for tau, axis in zip(TAUS, line, strict=True):
            for baseline, colour in COLOURS.items():
                values = [getattr(points[baseline, tau, size], name) for size in SIZES]
                axis.loglog(SIZES, values, "o-", color=colour, markersize=3, label=baseline)
            axis.grid(alpha=0.3)
            if name == "policy_error":
                axis.set_title(f"τ = {tau:g}")
                axis.set_ylim(bottom=1e-3)
    for axis in axes[-1]:
        axis.set_xlabel("K, responses in a group")
        axis.set_xticks(SIZES, [str(size) for size in SIZES], minor=False)
    axes[0][-1].legend(fontsize=8)
    save(figure, path)


def table(points: dict[tuple[str, float, int], Point]) -> str:
    """Error of the success probability as Markdown, one row a τ and baseline."""
    lines = [
        f"| τ | baseline | {' | '.join(f'K = {size}' for size in SIZES)} |",
        f"|---|---|{'---|' * len(SIZES)}",
    ]
    for tau in TAUS:
        for baseline in BASELINES:
            values = (f"{points[baseline, tau, size].policy_error:.3f}" for size in SIZES)
            lines.append(f"| {tau:g} | {baseline} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(output: Annotated[Path, typer.Option(help="the picture")] = Path("finite_sample.png")) -> None:
    """Draw the study and print its table."""
    points = study()
    draw(points, output)
    print(table(points))
    print(output)


if __name__ == "__main__":
    typer.run(main)
