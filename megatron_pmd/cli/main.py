"""The command line: train · data · evaluate · convert · report · doctor · simulate, and those of launch."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from megatron_pmd import __version__
from megatron_pmd.cli import cluster
from megatron_pmd.cli.convert import app as convert
from megatron_pmd.cli.data import data as show_data
from megatron_pmd.cli.extras import needs
from megatron_pmd.cli.numbers import finite
from megatron_pmd.cli.simulate import simulate
from megatron_pmd.cli.train import train
from megatron_pmd.errors import PmdError
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import SAVE, hold_back

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(convert, name="convert")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron-pmd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Post-train language models by policy mirror descent."""


AnswerPart = Literal["whole", "last_integer", "last_line"]


@app.command()
def evaluate(
    model_or_run: Annotated[Path, typer.Argument(help="a Hugging Face model folder, or a run's folder")],
    data: Annotated[
        Path | None, typer.Option(help="problems, .jsonl or .parquet; a run has held-out ones of its own")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="samples of each problem")] = 32,
    reward: Annotated[str | None, typer.Option(help="math, reasoning_gym, exact, or module:function")] = None,
    answer: Annotated[AnswerPart | None, typer.Option(help="part of a response that is graded")] = None,
    max_response_tokens: Annotated[
        int | None, typer.Option(min=1, help="default: the run's, or 1024 for a model folder")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, callback=finite, help="0: greedy")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many problems")] = None,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="dotted.key=value, e.g. data.train.answer_key=label for the file"),
    ] = None,
) -> None:
    """Sample a model, or a run's newest exported one, and grade it: mean@k, pass@k and their intervals."""
    with needs("cpu"):
        from megatron_pmd.evaluation.standalone import EvaluationRequest, main

    main(
        EvaluationRequest(
            model_or_run, data, k, reward, answer, max_response_tokens, temperature, limit,
            tuple(settings or ()),
        )
    )  # fmt: skip


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[
        Path | None, typer.Option(help="where to write, e.g. for a run that you may only read")
    ] = None,
) -> None:
    """Write RUN/report.html: curves, phase ledger, samples, configuration, in one file."""
    with needs("report"):
        from megatron_pmd.observe.report import write_report

    typer.echo(write_report(run, out))


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing for CPU, GPU and Slurm, and how to mend it."""
    from megatron_pmd import doctor as checks

    raise typer.Exit(checks.main())


@app.command()
def engines(
    run: Annotated[Path, typer.Argument(help="a run's folder, which this machine sees")],
    node: Annotated[int, typer.Option(min=0, help="which of its layout.engine_nodes this is, from 0")],
) -> None:
    """Be an engine node of a run: serve it until it ends. Training and Slurm start these by themselves."""
    hold_back(SAVE)
    with needs("cpu"):
        from megatron_pmd.node.engine_node import serve

    serve(run, node)


app.command("data")(show_data)
for command in (train, cluster.plan, simulate, cluster.launch, cluster.status, cluster.logs, cluster.cancel):
    app.command()(command)


def main(command: Callable[[], object] = app) -> None:
    """Entry point; a PmdError, or a file that the system refuses, is one message and an exit code."""
    try:
        command()
    except PmdError as error:
        outcome = RunOutcome.of(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        outcome = RunOutcome(
            Status.FAILED,
            f"{error.filename or 'a file'}: {error.strerror}" + ": make room and try again" * full,
        )
    else:
        return
    typer.secho(str(outcome), fg=typer.colors.RED, err=True)
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
