"""PMD beside GRPO and GSPO: one task, one warm start, equal samples, one to sixteen steps a rollout.

    python -m tools.studies.objectives [--folder runs/study] [--seed 0 …] [--draw study_objectives.png]

The task of `tiny_moe_cpu` (spelling words backward) with its model, in one process with one engine that all
runs share: each run begins from the same supervised checkpoint, and differs from the others in its objective,
its number of optimizer steps on each rollout, and its seed. A depth has one learning rate for all objectives,
∝ 1/√depth: steps on fewer samples are noisier. The curve is the mean reward of each rollout: that of the
policy π_t on prompts it has not trained on before.

Runs that are complete in --folder are not run again, and what is complete is drawn. A process takes one
core most of the time: two, of different seeds in folders of their own, keep two cores busy. Left out: a
learning rate of its own for every objective, the fairer comparison.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from megatron_pmd.actor.cpu import standins
from megatron_pmd.config import RunConfig, override
from megatron_pmd.files import read_object
from megatron_pmd.observe.folder import RunFolder
from recipes import recipe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    "layout.data=1", "layout.expert=1", "rollout.ranks_per_engine=1", "data.evaluation=null",
    "checkpoint.every=null", "checkpoint.hf_export=false", "checkpoint.asynchronous=false",
]  # fmt: skip


def configuration(objective: str, depth: int, seed: int) -> RunConfig:
    """One run of the study; its warm start is the study's."""
    rate = LEARNING_RATE / depth**0.5
    words = [f"name={objective}-{depth}-{seed}", f"seed={seed}", f"batch.prompts_per_step={PROMPTS // depth}"]
    words.append(f"optimizer.learning_rate={rate}")
    base = override(recipe("tiny_moe_cpu"), [*COMMON, *OBJECTIVES[objective], *words])
    return base.model_copy(update={"warm_start": None})


@contextmanager
def single_rank(config: RunConfig) -> Iterator[Any]:
    """This process as the only actor rank."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "0")
    standins.install()
    import torch

    from megatron_pmd.actor import parallel
    from megatron_pmd.distributed import Control

    torch.set_num_threads(1)
    parallel.initialize(config.layout, seed=0, timeout_seconds=600)
    try:
        yield Control(600)
    finally:
        torch.distributed.destroy_process_group()


def run_all(folder: Path, seeds: list[int]) -> None:
    """Train every run of these seeds that is not complete yet."""
    base = override(recipe("tiny_moe_cpu"), [*COMMON, "name=warm_start"])
    with ExitStack() as stack:
        control = stack.enter_context(single_rank(base))
        from megatron_pmd.actor.actor import Actor
        from megatron_pmd.data.tokenizer import load_tokenizer
        from megatron_pmd.node.worker import prepare_model
        from megatron_pmd.observe.console import Console
        from megatron_pmd.rewards.pool import RewardPool
        from megatron_pmd.training.live_engines import LiveEngines
        from megatron_pmd.training.run_log import RunLog
        from megatron_pmd.training.warm_start import warm_start

        prepare_model(base)
        quiet = Console(stack.enter_context((folder / "console.log").open("a")))
        tokenizer = load_tokenizer(base.model)
        rewards = stack.enter_context(RewardPool(base.reward))
        engines = LiveEngines(base, control, folder, tokenizer, rewards, quiet, cpu=True)
        stack.callback(engines.close)
        actor = Actor(base, control)
        start = folder / "warm_start" / "iteration-0"
        if not start.exists():
            warm_start(trainer(base, folder, control, actor, engines, RunLog(quiet, None), tokenizer))
            actor.save(start.parent, 0, {"iteration": 0})
        everything = list(itertools.product(seeds, DEPTHS, OBJECTIVES))
        for number, (seed, depth, objective) in enumerate(everything, 1):
            config = configuration(objective, depth, seed)
            actor.load(start)
            reward = train_one(config, folder / config.name, control, actor, engines, quiet, tokenizer)
            print(f"{number} of {len(everything)}  {config.name}  last reward {reward:.3f}", flush=True)


def trainer(
    config: RunConfig, folder: Path, control: Any, actor: Any, engines: Any, log: Any, tokenizer: Any
) -> Any:
    """A run that has not begun, with an actor and engines that outlive it."""
    from megatron_pmd.data.problem_sets import ProblemSets
    from megatron_pmd.training.shutdown import Shutdown
    from megatron_pmd.training.state import RunState
    from megatron_pmd.training.trainer import Trainer

    problems = ProblemSets.load(config, tokenizer, log.say)
    return Trainer(config, folder, control, actor, engines, log, problems, tokenizer, Shutdown(), RunState())


def train_one(
    config: RunConfig, folder: Path, control: Any, actor: Any, engines: Any, console: Any, tokenizer: Any
) -> float:
    """The loop itself; returns the last reward."""
    from megatron_pmd.observe.journal import Journal
    from megatron_pmd.training.loop import train
    from megatron_pmd.training.run_log import RunLog

    summary = read_object(folder / "summary.json")
    if summary and summary["status"] == "complete":
        return summary["last_reward"]
    for file in ("metrics.jsonl", "ledger.jsonl", "config.json"):
        (folder / file).unlink(missing_ok=True)
    journal = Journal.open(folder, config, 0)
    log = RunLog(console, journal)
    outcome = train(trainer(config, folder, control, actor, engines, log, tokenizer))
    return journal.finish(outcome)["last_reward"]


def curves(folder: Path) -> dict[tuple[str, int], list[list[float]]]:
    """Reward of each iteration, one list a seed that is complete, by objective and depth."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    for objective, depth, seed in itertools.product(OBJECTIVES, DEPTHS, SEEDS):
        run = folder / f"{objective}-{depth}-{seed}"
        summary = read_object(run / "summary.json")
        if summary and summary["status"] == "complete":
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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
    folder.mkdir(parents=True, exist_ok=True)
    run_all(folder, seed)
    found = curves(folder)
    draw(found, picture)
    (folder / "curves.json").write_text(json.dumps({f"{o}-{d}": v for (o, d), v in found.items()}))
    print(table(found))
    print(picture)


if __name__ == "__main__":
    typer.run(main)
