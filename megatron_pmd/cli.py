"""The command line: megatron-pmd train · evaluate · convert · report · doctor, and those of launch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from megatron_pmd.config import StopAfter
from megatron_pmd.convert.command import app as convert
from megatron_pmd.errors import Interrupted, PmdError
from megatron_pmd.launch import commands
from megatron_pmd.lifecycle import SAVED_EXIT_CODE
from recipes import configuration

app = typer.Typer(
    help="Post-train language models by policy mirror descent.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(convert, name="convert")

Settings = Annotated[Optional[list[str]], typer.Argument(help="dotted.key=value, e.g. algorithm.tau=0.05")]  # noqa: UP045
AnswerPart = Literal["whole", "last_integer", "last_line"]


@app.command()
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
    from megatron_pmd.launcher import is_complete, run_here, status
    from megatron_pmd.observe.console import Console
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


@app.command()
def evaluate(
    model_or_run: Annotated[Path, typer.Argument(help="a Hugging Face model folder, or a run's folder")],
    data: Annotated[
        Path | None, typer.Option(help="problems, .jsonl or .parquet; a run has held-out ones of its own")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="samples of each problem")] = 32,
    reward: Annotated[str | None, typer.Option(help="math, reasoning_gym, exact, or module:function")] = None,
    answer: Annotated[AnswerPart | None, typer.Option(help="part of a response that is graded")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many problems")] = None,
) -> None:
    """Sample a model, or a run's newest exported one, and grade it: mean@k, pass@k and their intervals."""
    from megatron_pmd.evaluate import Asked, main

    main(Asked(model_or_run, data, k, reward, answer, max_response_tokens, temperature, limit))


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


for command in (commands.plan, commands.launch, commands.status, commands.logs, commands.cancel):
    app.command()(command)


def main(command: Callable[[], object] = app) -> None:
    """Entry point; a PmdError is one message and exit code 1, not a traceback."""
    try:
        command()
    except PmdError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        sys.exit(130 if isinstance(error, Interrupted) else 1)


if __name__ == "__main__":
    main()
