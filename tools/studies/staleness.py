"""How much samples of an older policy cost: PMD beside GRPO, GSPO and CISPO, and the exact curves of PMD.

    python -m tools.studies.staleness [--folder runs/staleness] [--lag 0 …] [--way pmd …] [--seed 0 …]

The task of `tiny_moe_cpu` with its model (harness.py). A run of lag n trains every iteration on samples that
are n iterations old, as an overlapped run with rollout.staleness=n does at the worst; in its first n
iterations they are of the first policy. All runs have as many samples and steps. What is compared is the
share of held-out problems that the policy solves, so that no run is measured on what it trained on.

The ways that train on them:
- pmd: the anchor is π_t, computed anew; no weights. What an overlapped run does.
- pmd_weighted: the same, each sample weighed by π_t/b, at most 2 (sequence_tis).
- pmd_anchor_engine: the anchor is the policy that sampled. The configuration refuses it.
- grpo, gspo, cispo: their ratios are to π_t, as verl and slime compute them by default; no weights.

Runs that are complete in --folder are not run again, and what is complete is drawn.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer

from megatron_pmd.algorithm.stale_optimum import optimum_of_stale_samples
from megatron_pmd.config import RunConfig
from tools.studies.harness import complete_summary, evaluations, laboratory, study_run
from tools.studies.pictures import band, save

WAYS = {
    "pmd": ["algorithm.objective=pmd"],
    "pmd_weighted": ["algorithm.objective=pmd", "algorithm.mismatch.weight=sequence_tis"],
    "pmd_anchor_engine": ["algorithm.objective=pmd"],
    "grpo": ["algorithm.objective=grpo", "algorithm.objective.divide_by_deviation=true"],
    "gspo": ["algorithm.objective=gspo"],
    "cispo": ["algorithm.objective=cispo"],
}
NAMES = [*WAYS]
LAGS = [0, 1, 2, 4, 8]
SEEDS = [0, 1, 2]
ITERATIONS, EVERY = 20, 5
COMMON = [
    "batch.prompts_per_rollout=32", "batch.samples_per_prompt=16", "batch.prompts_per_step=8",
    f"iterations={ITERATIONS}", f"evaluation.every={EVERY}", "optimizer.learning_rate=2e-4",
]  # fmt: skip
EXACT_START, EXACT_TAU, EXACT_ITERATIONS = 0.05, 1.0, 12
"""Of the exact curves, which are those of pmd.md: at τ = 1 they take several iterations to rise."""

Results = dict[tuple[str, int], list[list[float]]]
"""By way and lag: for each seed, the share of held-out problems solved at each evaluation."""


def configuration(way: str, lag: int, seed: int) -> RunConfig:
    """One run of the study."""
    config = study_run(f"{way}-{lag}-{seed}", [*COMMON, *WAYS[way], f"seed={seed}"])
    # Set behind the checks of the configuration: the engine is not apart, but its samples are as old; and the
    # anchor that is refused beside old samples is what is measured.
    changes: dict[str, object] = {"rollout": config.rollout.model_copy(update={"staleness": lag})}
    if way == "pmd_anchor_engine":
        changes["algorithm"] = config.algorithm.model_copy(update={"anchor": "engine"})
    return config.model_copy(update=changes)


def run_all(folder: Path, ways: list[str], lags: list[int], seeds: list[int]) -> None:
    """Train every run of these that is not complete yet."""
    everything = list(itertools.product(seeds, lags, ways))
    with laboratory(folder, COMMON) as found:
        for number, (seed, lag, way) in enumerate(everything, 1):
            config = configuration(way, lag, seed)
            found.train(config, lag)
            solved = evaluations(folder / config.name)[-1]
            print(f"{number} of {len(everything)}  {config.name}  solves {solved:.3f}", flush=True)


def results(folder: Path) -> Results:
    """Of what is complete."""
    found: Results = {}
    for way, lag, seed in itertools.product(WAYS, LAGS, SEEDS):
        run = folder / f"{way}-{lag}-{seed}"
        if complete_summary(run):
            found.setdefault((way, lag), []).append(evaluations(run))
    return found


def exact_curve(way: str, lag: int) -> list[float]:
    """Success of PMD-mean after each exact update, for a reward of 1 or 0; docs/algorithm.md, (8).

    pmd: anchor π_t. pmd_weighted: so weighed, samples are those of π_t, with the mean reward of older ones.
    pmd_anchor_engine: the anchor is what sampled.
    """
    policies = [EXACT_START]
    for iteration in range(EXACT_ITERATIONS):
        now, old = policies[-1], policies[max(0, iteration - lag)]
        sampled, anchor = {
            "pmd": (old, now), "pmd_weighted": (now, now), "pmd_anchor_engine": (old, old),
        }[way]  # fmt: skip
        both = [np.array([p, 1 - p]) for p in (sampled, anchor)]
        log_ratio, _ = optimum_of_stale_samples(
            [1.0, 0.0], both[0], both[1], EXACT_TAU, baseline=old if way == "pmd_weighted" else None
        )
        policies.append(float(anchor * np.exp(log_ratio[0])))
    return policies


def draw(found: Results, path: Path) -> None:
    """Above: what each way reaches, against the lag, and the exact ends. Below: the curves of each lag."""
    measured = sorted({lag for _, lag in found})
    figure = plt.figure(figsize=(15, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    ends, exact = above.subplots(1, 2)
    curves = below.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for colour, way in zip(plt.get_cmap("tab10").colors, WAYS, strict=False):  # type: ignore[attr-defined]
        lags = [lag for lag in measured if (way, lag) in found]
        band(ends, lags, [[rewards[-1] for rewards in found[way, lag]] for lag in lags], colour, way)
        for axis, lag in zip(curves, measured, strict=True):
            columns = list(zip(*found.get((way, lag), []), strict=True))
            band(axis, [EVERY * k for k in range(len(columns))], columns, colour, way)
            axis.set_title(f"lag {lag}")
            axis.set_xlabel("iteration")
        if way.startswith("pmd"):
            exact.plot(LAGS, [exact_curve(way, lag)[6] for lag in LAGS], "o-", color=colour, label=way)
    ends.set_title(f"held-out problems solved after {ITERATIONS} iterations")
    exact.set_title(f"exact: success after 6 updates from {EXACT_START}, τ = {EXACT_TAU:g}")
    for axis in (ends, exact):
        axis.set_xlabel("lag: age of the samples, iterations")
        axis.set_xticks(LAGS)
        axis.legend(fontsize=8)
    for axis in (ends, exact, *curves):
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1)
    save(figure, path)


def table(found: Results) -> Iterator[str]:
    """Held-out problems solved at the end, over the seeds that are complete, with the lowest and highest."""
    yield "| way | " + " | ".join(f"lag {lag}" for lag in LAGS) + " |"
    yield "|---" * (len(LAGS) + 1) + "|"
    for way in WAYS:
        cells = []
        for lag in LAGS:
            ends = [rewards[-1] for rewards in found.get((way, lag), [])]
            span = f" ({min(ends):.2f}–{max(ends):.2f})" if len(ends) > 1 else ""
            cells.append(f"{statistics.mean(ends):.3f}{span}" if ends else "")
        yield f"| {way} | " + " | ".join(cells) + " |"


def main(
    folder: Annotated[Path, typer.Option(help="runs of the study")] = Path("runs/staleness"),
    picture: Annotated[Path, typer.Option("--draw", help="the picture")] = Path("study_staleness.png"),
    way: Annotated[list[str], typer.Option(help="ways to run; all that --folder holds are drawn")] = NAMES,
    lag: Annotated[list[int], typer.Option(help="lags to run, iterations")] = LAGS,
    seed: Annotated[list[int], typer.Option(help="seeds to run")] = SEEDS,
) -> None:
    """Run what is missing, then draw and print the table."""
    run_all(folder, way, lag, seed)
    found = results(folder)
    draw(found, picture)
    print("\n".join(table(found)))
    print(picture)


if __name__ == "__main__":
    typer.run(main)
