"""PMD beside GRPO and GSPO: one task, one warm start, equal samples, one to sixteen steps a rollout.

    python -m tools.studies.objectives [--folder runs/study] [--seed 0 …] [--draw study_objectives.png]

The task of `tiny_moe_cpu` (spelling words backward) with its model (harness.py): each run begins from the
same supervised checkpoint, and differs from the others in its objective, its number of optimizer steps on
each rollout, and its seed. A depth has one learning rate for all objectives, ∝ 1/√depth: steps on fewer
samples are noisier. The curve is the mean reward of each rollout: that of the policy π_t on prompts it has
not trained on before.

Runs that are complete in --folder are not run again, and what is complete is drawn. Left out: a learning
rate of its own for every objective, the fairer comparison.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer

from megatron_pmd.config import RunConfig
from megatron_pmd.observe.folder import RunFolder
from tools.studies.harness import complete_summary, laboratory, study_run
from tools.studies.pictures import save

OBJECTIVES = {
    "pmd_mean": ["algorithm.objective=pmd", "algorithm.baseline=mean"],
    "pmd_partition": ["algorithm.objective=pmd", "algorithm.baseline=partition"],
    "grpo": ["algorithm.objective=grpo", "algorithm.objective.divide_by_deviation=true"],
    "gspo": ["algorithm.objective=gspo"],
}
COLOURS = {"pmd_mean": "#1f5fa8", "pmd_partition": "#2a9d7c", "grpo": "#b5471d", "gspo": "#8f78d8"}
DEPTHS = (1, 4, 16)
"""Optimizer steps on one rollout."""
SEEDS = [0, 1, 2]
PROMPTS, SAMPLES = 32, 16
ITERATIONS = 20
LEARNING_RATE = 4e-4
"""At depth 1."""
COMMON = [
    f"batch.prompts_per_rollout={PROMPTS}", f"batch.samples_per_prompt={SAMPLES}", f"iterations={ITERATIONS}",
    "data.evaluation=null",
]  # fmt: skip


def configuration(objective: str, depth: int, seed: int) -> RunConfig:
    """One run of the study."""
    rate = LEARNING_RATE / depth**0.5
    own = [f"seed={seed}", f"batch.prompts_per_step={PROMPTS // depth}", f"optimizer.learning_rate={rate}"]
    return study_run(f"{objective}-{depth}-{seed}", [*COMMON, *OBJECTIVES[objective], *own])


def run_all(folder: Path, seeds: list[int]) -> None:
    """Train every run of these seeds that is not complete yet."""
    everything = list(itertools.product(seeds, DEPTHS, OBJECTIVES))
    with laboratory(folder, COMMON) as found:
        for number, (seed, depth, objective) in enumerate(everything, 1):
            summary = found.train(configuration(objective, depth, seed))
            print(
                f"{number} of {len(everything)}  {summary['name']}  last reward {summary['last_reward']:.3f}",
                flush=True,
            )


def curves(folder: Path) -> dict[tuple[str, int], list[list[float]]]:
    """Reward of each iteration, one list a seed that is complete, by objective and depth."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    for objective, depth, seed in itertools.product(OBJECTIVES, DEPTHS, SEEDS):
        run = folder / f"{objective}-{depth}-{seed}"
        if complete_summary(run):
            rewards = [line["reward"] for line in RunFolder.read(run).iterations]
            found.setdefault((objective, depth), []).append(rewards)
    return found


def draw(found: dict[tuple[str, int], list[list[float]]], path: Path) -> None:
    """One panel a depth: the mean over seeds, and their range as a band."""
    figure, axes = plt.subplots(1, len(DEPTHS), figsize=(13, 4.2), sharey=True, layout="constrained")
    for axis, depth in zip(axes, DEPTHS, strict=True):
        for objective, colour in COLOURS.items():
            columns = list(zip(*found.get((objective, depth), []), strict=True))
            x = range(len(columns))
            axis.plot(x, [statistics.mean(c) for c in columns], color=colour, label=objective)
            axis.fill_between(
                x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15
            )
        axis.set_title(f"{depth} optimizer step{'s' if depth > 1 else ''} a rollout")
        axis.set_xlabel("iteration")
        axis.set_xticks(range(0, ITERATIONS + 1, 5))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean reward of the rollout")
    axes[0].legend()
    save(figure, path)


def table(found: dict[tuple[str, int], list[list[float]]]) -> str:
    """Mean reward of the last four iterations, over the seeds, with their lowest and highest."""
    lines = [
        "| steps a rollout | objective | reward at the end | lowest, highest seed |",
        "|---|---|---|---|",
    ]
    for depth, objective in itertools.product(DEPTHS, OBJECTIVES):
        ends = [statistics.mean(rewards[-4:]) for rewards in found.get((objective, depth), [])]
        if not ends:
            continue
        spread = f"{min(ends):.3f}, {max(ends):.3f}"
        lines.append(f"| {depth} | {objective} | {statistics.mean(ends):.3f} | {spread} |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Option(help="runs of the study")] = Path("runs/study"),
    picture: Annotated[Path, typer.Option("--draw", help="the picture")] = Path("study_objectives.png"),
    seed: Annotated[list[int], typer.Option(help="seeds to run; all that --folder holds are drawn")] = SEEDS,
) -> None:
    """Run what is missing, then draw and print the table."""
    run_all(folder, seed)
    found = curves(folder)
    draw(found, picture)
    (folder / "curves.json").write_text(json.dumps({f"{o}-{d}": v for (o, d), v in found.items()}))
    print(table(found))
    print(picture)


if __name__ == "__main__":
    typer.run(main)
