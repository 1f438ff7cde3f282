"""The command line: megatron-pmd train · evaluate · report · doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.config import RunConfig, load, override
from megatron_pmd.errors import ConfigError, PmdError

app = typer.Typer(
    help="Post-train language models by policy mirror descent.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

Settings = Annotated[Optional[list[str]], typer.Argument(help="dotted.key=value, e.g. algorithm.tau=0.05")]  # noqa: UP045


def configuration(recipe: str, settings: list[str]) -> RunConfig:
    """The configuration a recipe's name or a config.json stands for, with the settings applied.

    Raises ConfigError for an unknown recipe, naming those there are.
    """
    if recipe.endswith(".json"):
        if not Path(recipe).is_file():
            raise ConfigError(f"{recipe}: no such file")
        return override(load(Path(recipe)), settings)
    from recipes import recipe as by_name

    return override(by_name(recipe), settings)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a config.json written by a run")],
    settings: Settings = None,
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    stop_after: Annotated[Optional[str], typer.Option(help="stop after this phase of the next iteration: rollout")] = None,  # noqa: UP045
    replay: Annotated[Optional[Path], typer.Option(help="train on this rollout file or folder, without engines")] = None,  # noqa: UP045
) -> None:
    """Train on this machine; started again with the same words, it resumes where it stopped."""
    from megatron_pmd.launcher import run_here
    from megatron_pmd.observe.console import Console
    from megatron_pmd.observe.report import write_report

    config = configuration(recipe, settings or [])
    if stop_after not in (None, "rollout"):
        raise ConfigError(f"--stop-after {stop_after}: the phase a run can stop after is rollout")
    folder = runs / config.name
    run_here(config, folder, replay=replay, stop_after=stop_after)
    Console().closing(folder, write_report(folder))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write RUN/report.html: curves, phase ledger, samples, configuration, in one file."""
    from megatron_pmd.observe.report import write_report

    typer.echo(write_report(run))


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing for CPU, GPU and Slurm, and how to mend it."""
    from megatron_pmd import doctor as checks

    raise typer.Exit(checks.main())


def main() -> None:
    """Entry point; a PmdError is one message and exit code 1, not a traceback."""
    try:
        app()
    except PmdError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
