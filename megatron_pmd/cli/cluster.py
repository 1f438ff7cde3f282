"""The commands around a cluster: plan · launch · status · logs · cancel. None of them imports torch."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.train import Recipe, Settings
from megatron_pmd.config import RunConfig
from megatron_pmd.errors import LaunchError, UncountedModel
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.launch.script import Job, job_for, render
from megatron_pmd.launch.submit import Through
from recipes import configuration

PROFILE = "a profile in slurm/clusters, or a .toml file"
Profile = Annotated[str, typer.Option(help=PROFILE)]
RunFolder = Annotated[Path, typer.Argument(help="a run's folder, runs/NAME")]


def plan(recipe: Recipe, settings: Settings = None, cluster: Profile = "h100") -> None:
    """What a run needs of a cluster, before it queues; refused when it cannot fit."""
    from megatron_pmd.planner.planning import check, make_plan
    from megatron_pmd.planner.table import show

    made = make_plan(configuration(recipe, settings or []), load_cluster(cluster).machines)
    show(made)
    check(made)


def launch(
    recipe: Recipe,
    settings: Settings = None,
    cluster: Annotated[Optional[str], typer.Option(help=f"{PROFILE}; else h100")] = None,  # noqa: UP045
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be submitted; needs no Slurm")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="train on this machine instead")] = False,
    chain: Annotated[int, typer.Option(min=1, help="jobs, each after the end of the one before")] = 1,
    through: Annotated[Through, typer.Option(help="auto: nemo-run where it is installed")] = "auto",
    replay: Annotated[
        Path | None, typer.Option(help="train on this rollout file or folder, without engines")
    ] = None,
) -> None:
    """Submit a run to a Slurm cluster; submitted again, it resumes."""
    from megatron_pmd.engine.families import check_served
    from megatron_pmd.engine.placement import sampled_by
    from megatron_pmd.planner.planning import check, make_plan

    config = configuration(recipe, settings or [])
    if local:
        if dry_run or chain > 1 or cluster is not None or through != "auto":
            raise LaunchError(
                "--local trains here at once: --cluster, --dry-run, --chain and --through are for a cluster; "
                "`megatron-pmd plan` says whether the run fits"
            )
        from megatron_pmd.cli.train import train

        return train(recipe, settings, replay=replay)
    profile = load_cluster(cluster or "h100")
    try:
        check(make_plan(config, profile.machines, replay=replay is not None))
    except UncountedModel as error:
        typer.echo(f"memory and disk not compared with a plan: {error}", err=True)
    if sampled_by(config, replay=replay is not None) == "engines":
        # before the job has queued
        check_served(Path(config.model.path), cpu=profile.machines.shares_host_memory)
    # a relative `shared` is meant from here; an absolute one may exist on the cluster alone
    root = PurePosixPath(profile.shared)
    job = job_for(
        config,
        profile,
        root if root.is_absolute() else PurePosixPath(Path(root).resolve()),
        str(replay.resolve()) if replay else None,
    )
    if dry_run:
        _show(job)
        return None
    from megatron_pmd.launch.submit import submit

    numbers = submit(job, chain=chain, through=through)
    typer.echo(
        f"submitted {job.run} as job {', '.join(numbers)}: {job.nodes} node(s) of cluster {profile.name}"
    )
    typer.echo(
        f"megatron-pmd status {job.run}\nmegatron-pmd logs -f {job.run}\nmegatron-pmd cancel {job.run}"
    )


def _show(job: Job) -> None:
    """The resolved configuration, the batch arithmetic, and the script."""
    typer.echo(dry_run_text(job.config, job))


def dry_run_text(config: RunConfig, job: Job) -> str:
    from megatron_pmd.planner.table import batch_arithmetic

    resolved = json.dumps(config.model_dump(mode="json"), indent=2)
    rows = batch_arithmetic(config, replay=job.replay is not None)
    arithmetic = "\n".join(f"{name:<28} {value}" for name, value in rows)
    return f"--- configuration\n{resolved}\n--- batch\n{arithmetic}\n--- script\n{render(job)}"


def status(run: RunFolder) -> None:
    """How far a run is, what its jobs are doing, and why it stopped."""
    from megatron_pmd.launch.progress import describe

    _refuse_strange_folder(run)
    for line in describe(run):
        typer.echo(line)


def _refuse_strange_folder(run: Path) -> None:
    """LaunchError for a folder from which nothing was launched."""
    if not (run / "launch").is_dir():
        raise LaunchError(f"{run}: nothing was launched here; give the folder of one run, e.g. runs/NAME")


def logs(
    run: RunFolder,
    follow: Annotated[bool, typer.Option("-f", help="go on as it grows, until the job ends")] = False,
    lines: Annotated[int, typer.Option("-n", min=0, help="of the end")] = 100,
) -> None:
    """The output of a run's job: of the batch script, and of the first rank of each node."""
    from megatron_pmd.launch.progress import follow_log

    for line in follow_log(run, lines, follow=follow):
        typer.echo(line, nl=False)


def cancel(run: RunFolder) -> None:
    """Cancel every job of a run; launch it again to resume from its last checkpoint."""
    from megatron_pmd.launch.submit import cancel as cancel_jobs

    _refuse_strange_folder(run)
    numbers = cancel_jobs(run)
    typer.echo(f"cancelled {', '.join(numbers)}" if numbers else "no job of this run waits or runs")
