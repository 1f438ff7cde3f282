"""The command that trains on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.extras import needs
from megatron_pmd.config import StopAfter
from megatron_pmd.training.shutdown import SAVED_EXIT_CODE
from recipes import configuration

Settings = Annotated[Optional[list[str]], typer.Argument(help="dotted.key=value, e.g. algorithm.tau=0.05")]  # noqa: UP045


def train(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a config.json written by a run")],
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
    with needs("cpu"):
        from megatron_pmd.node.ranks import run_here
        from megatron_pmd.observe.console import Console
        from megatron_pmd.observe.folder import is_complete, status
        from megatron_pmd.observe.report import write_report

    config = configuration(recipe, settings or [])
    folder, console = runs / config.name, Console()
    if is_complete(folder, config):
        console.say(f"{folder} is complete: nothing is left to train; raise iterations to go on")
    else:
        run_here(config, folder, replay=replay, stop_after=stop_after)
    console.closing(folder, write_report(folder))
    if status(folder) == "saved":
        raise typer.Exit(SAVED_EXIT_CODE)
