"""Muon beside Adam: one task, one start, equal samples, each optimizer at its best of five learning rates.

    python -m tools.studies.muon adam [--task demo] [--folder runs/muon-demo] [--rate 1e-4 …]
    python -m tools.studies.muon muon …

--task: `tiny` is that of `tiny_moe_cpu`, with the runs of staleness.py without lag; `demo` is that of
`make demo`, with its own batches and half of its iterations: it learns most in those. The first seed trains
with all rates, the others with the one at which the first solved most held-out problems.

A process has one optimizer and one actor rank (harness.py). Of `tiny`, Adam's comes first: its supervised
model is what both start from, without moments or momentum. Runs that are complete in --folder are not run
again, and what is complete is drawn. A folder is of one task.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import typer

from megatron_pmd.config import RunConfig, override
from megatron_pmd.errors import DataError
from recipes import recipe
from tools.studies.harness import TINY, complete_summary, evaluations, laboratory, study_run
from tools.studies.pictures import band, save
from tools.studies.staleness import COMMON, SEEDS

Name = Literal["adam", "muon"]
COLOURS: dict[Name, str] = {"adam": "#1f5fa8", "muon": "#b5471d"}
STILL = ["warm_start.steps=1", "warm_start.learning_rate=1e-30", "warm_start.problems_per_step=1"]
"""A step too small to move a weight: the start's checkpoint then has the states that each run resets."""


@dataclass(frozen=True)
class Task:
    """What both optimizers train."""

    recipe: str
    settings: list[str]
    """Of all runs."""
    rates: list[float]
    """Of both: Muon's update of a matrix is scaled to the size of Adam's (megatron_pmd/actor/muon.py)."""

    @property
    def every(self) -> int:
        """Iterations between evaluations."""
        every = override(recipe(self.recipe), self.settings).evaluation.every
        assert every is not None, "the settings say it"
        return every

    @property
    def supervised(self) -> bool:
        """Whether the start is taught, and not only read."""
        return recipe(self.recipe).warm_start is not None


TASKS = {
    "tiny": Task(TINY, COMMON, [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]),
    # the second of the rates is the demo's own
    "demo": Task(
        "smollm2_135m_cpu",
        ["iterations=6", "evaluation.every=3", "evaluation.samples_per_prompt=4"],
        [1.5e-5, 3e-5, 6e-5, 1.2e-4, 2.4e-4],
    ),
}

Results = dict[tuple[Name, float], dict[int, list[float]]]
"""By optimizer and rate: for each seed, the share of held-out problems solved at each evaluation."""


def start_of(folder: Path) -> Path:
    """The supervised model that Adam's process writes."""
    return folder / "start"


def settings(task: Task, optimizer: Name, folder: Path) -> list[str]:
    """Of all runs of an optimizer."""
    own = [*task.settings, f"optimizer.name={optimizer}"]
    if task.supervised and optimizer == "adam":
        return own
    start = [f"model.path={start_of(folder)}"] if task.supervised else []
    return [*own, *start, *STILL]


def configuration(task: Task, optimizer: Name, folder: Path, rate: float, seed: int) -> RunConfig:
    """One run of the study."""
    own = [f"optimizer.learning_rate={rate}", f"seed={seed}"]
    return study_run(f"{rate:g}-{seed}", [*settings(task, optimizer, folder), *own], task.recipe)


def run_all(task: Task, folder: Path, optimizer: Name, rates: list[float], seeds: list[int]) -> None:
    """Train every run of an optimizer and these seeds that is not complete yet.

    rates: of the first seed.
    Raises DataError where Adam's process has not yet written the start.
    """
    if optimizer == "muon" and task.supervised and not start_of(folder).exists():
        raise DataError(f"{start_of(folder)}: no such folder; run the study of adam first, which writes it")
    with laboratory(folder / optimizer, settings(task, optimizer, folder), task.recipe) as found:
        if task.supervised and not start_of(folder).exists():
            found.write_start(start_of(folder))
        for seed in sorted(seeds):
            for rate in rates if seed == SEEDS[0] else [best_rate(results(task, folder), optimizer)]:
                config = configuration(task, optimizer, folder, rate, seed)
                found.train(config)
                solved = evaluations(folder / optimizer / config.name)[-1]
                print(f"{optimizer}  {config.name}  solves {solved:.3f}", flush=True)


def results(task: Task, folder: Path) -> Results:
    """Of what is complete."""
    found: Results = {}
    for optimizer in COLOURS:
        for rate in task.rates:
            runs = {seed: folder / optimizer / f"{rate:g}-{seed}" for seed in SEEDS}
            complete = {seed: evaluations(run) for seed, run in runs.items() if complete_summary(run)}
            if complete:
                found[optimizer, rate] = complete
    return found


def best_rate(found: Results, optimizer: Name) -> float:
    """At which the first seed solves most at the end. Raises DataError where no rate has run with it."""
    ends = {
        rate: seeds[SEEDS[0]][-1]
        for (name, rate), seeds in found.items()
        if name == optimizer and SEEDS[0] in seeds
    }
    if not ends:
        raise DataError(
            f"no run of {optimizer} with seed {SEEDS[0]} is complete: it chooses the rate; run it"
        )
    return max(ends, key=lambda rate: ends[rate])


def draw(task: Task, found: Results, path: Path) -> None:
    """Left: what the first seed reaches at each rate. Right: the curves of all seeds at the best one."""
    figure, (by_rate, curves) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for optimizer, colour in COLOURS.items():
        rates = [rate for name, rate in found if name == optimizer and SEEDS[0] in found[name, rate]]
        if not rates:
            continue
        ends = [found[optimizer, rate][SEEDS[0]][-1] for rate in rates]
        by_rate.plot(rates, ends, "o-", color=colour, label=optimizer)
        best = best_rate(found, optimizer)
        columns = list(zip(*found[optimizer, best].values(), strict=True))
        band(curves, [task.every * k for k in range(len(columns))], columns, colour, f"{optimizer}, {best:g}")
    by_rate.set(xscale="log", xlabel="learning rate", title="solved at the end, one seed")
    by_rate.set_xticks(task.rates, [f"{rate:g}" for rate in task.rates], minor=False)
    by_rate.set_xticks([], minor=True)
    curves.set(xlabel="iteration", title="at the best rate, mean and range of the seeds")
    by_rate.set_ylabel("share of held-out problems solved")
    for axis in (by_rate, curves):
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
    save(figure, path)


def table(task: Task, found: Results) -> Iterator[str]:
    """Held-out problems solved at the end: of the first seed by rate, and of all seeds at the best one."""
    yield "| optimizer | " + " | ".join(f"{rate:g}" for rate in task.rates) + " | all seeds at the best |"
    yield "|---" * (len(task.rates) + 2) + "|"
    for optimizer in COLOURS:
        seeds = [found.get((optimizer, rate), {}) for rate in task.rates]
        cells = [f"{each[SEEDS[0]][-1]:.3f}" if SEEDS[0] in each else "" for each in seeds]
        if any(cells):
            ends = [curve[-1] for curve in found[optimizer, best_rate(found, optimizer)].values()]
            many = f"{len(ends)} of {len(SEEDS)} seeds"
            cells.append(f"{statistics.mean(ends):.3f} ({min(ends):.2f}–{max(ends):.2f}), {many}")
            yield f"| {optimizer} | " + " | ".join(cells) + " |"


def main(
    optimizer: Annotated[Name, typer.Argument(help="whose runs are made; all that --folder holds are drawn")],
    name: Annotated[Literal["tiny", "demo"], typer.Option("--task", help="what is trained")] = "tiny",
    folder: Annotated[Path | None, typer.Option(help="runs of the study; else runs/muon-TASK")] = None,
    picture: Annotated[Path, typer.Option("--draw", help="the picture")] = Path("study_muon.png"),
    rate: Annotated[list[float] | None, typer.Option(help="rates for the first seed; else all")] = None,
    seed: Annotated[list[int], typer.Option(help="seeds to run")] = SEEDS,
) -> None:
    """Run what is missing, then draw and print the table."""
    task, folder = TASKS[name], folder or Path(f"runs/muon-{name}")
    run_all(task, folder, optimizer, rate or task.rates, seed)
    found = results(task, folder)
    draw(task, found, picture)
    print("\n".join(table(task, found)))
    print(picture)


if __name__ == "__main__":
    typer.run(main)
