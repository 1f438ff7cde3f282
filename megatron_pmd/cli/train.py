"""The command that trains on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.extras import needs
from megatron_pmd.config import StopAfter
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import SAVE, hold_back
from recipes import configuration

Recipe = Annotated[str, typer.Argument(help="a recipe's name, its .py file, or a run's config.json")]
Settings = Annotated[Optional[list[str]], typer.Argument(help="dotted.key=value, e.g. algorithm.tau=0.05")]  # noqa: UP045


def train(
    recipe: Recipe,
    settings: Settings = None,
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    stop_after: Annotated[
        StopAfter | None, typer.Option(help="stop after this phase of the next iteration")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="train on this rollout file or folder, without engines")
    ] = None,
) -> None:
    """Train on this machine; started again with the same words, it resumes where it stopped."""
    hold_back(SAVE)  # before numpy starts threads
    with needs("cpu"):
        from megatron_pmd.node.ranks import run_here
        from megatron_pmd.observe.console import Console
        from megatron_pmd.observe.report import write_report
        from megatron_pmd.observe.summary import is_complete

    config = configuration(recipe, settings or [])
    folder, console = runs / config.name, Console()
    if is_complete(folder, config):
        console.say(f"{folder} is complete: nothing is left to train; raise iterations to go on")
        outcome = RunOutcome(Status.COMPLETE)
    else:
        outcome = run_here(config, folder, replay=replay, stop_after=stop_after)
    if outcome.error is None:
        console.closing(folder, write_report(folder))
    else:
        typer.secho(str(outcome), fg=typer.colors.RED, err=True)
    raise typer.Exit(outcome.exit_code)
