"""The command that plays a run before there are machines for it. It imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.cluster import Profile
from megatron_pmd.cli.extras import needs
from megatron_pmd.cli.numbers import finite
from megatron_pmd.cli.train import Recipe, Settings
from megatron_pmd.launch.cluster import load_cluster
from recipes import configuration

DEVICE_HOURS = 50_000.0
"""Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 GPUs."""


def simulate(
    recipe: Recipe,
    settings: Settings = None,
    cluster: Profile = "h100",
    iterations: Annotated[int, typer.Option(min=2, help="played of each run")] = 20,
    staleness: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=0, help="iterations, of an overlapped run; several times for several runs"),
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option(help="take lengths from this rollout file, or a folder of them")
    ] = None,
    sigma: Annotated[
        float,
        typer.Option(min=0.0, max=5.0, callback=finite, help="of lengths' logarithm, without --rollouts"),
    ] = 1.0,
    device_hours: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="between failures of one device; 0: nothing fails")
    ] = DEVICE_HOURS,
    restart_minutes: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="from a failure until the run works again")
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="of lengths and failures")] = 0,
    picture: Annotated[Path | None, typer.Option(help="write an HTML picture to this file")] = None,
) -> None:
    """Play a run event by event: colocated, partial and overlapped on the same devices, with failures."""
    from megatron_pmd.planner.planning import check, make_plan
    from megatron_pmd.simulator.comparing import Play, compare, planned_lengths
    from megatron_pmd.simulator.lengths import Lengths, recorded
    from megatron_pmd.simulator.scenario import Failures
    from megatron_pmd.simulator.table import show

    plan = make_plan(configuration(recipe, settings or []), load_cluster(cluster).machines)
    check(plan)
    lengths: Lengths = planned_lengths(plan, sigma)
    if rollouts is not None:
        with needs("report"):
            lengths = recorded(rollouts)
    failures = Failures(1 / device_hours / 3600 if device_hours else 0.0, 60 * restart_minutes)
    own = plan.config.rollout
    ages = staleness or [own.staleness if own.placement == "separate" else 1]
    how = Play(lengths, iterations, iterations // 4, failures, sorted(set(ages)), seed)
    runs = compare(plan, how)
    title = f"{plan.config.name} on {runs[0].scenario.devices:,} x {plan.machines.device.name}"
    show(title, runs, how)
    if not any(played.scenario.mode == "overlapped" for played in runs):
        typer.echo("No overlapped run: these devices cannot be split into engines and a trainer that fits.")
    if picture is not None:
        with needs("report"):
            from megatron_pmd.simulator.picture import write
        write(title, runs, picture)
        typer.echo(picture)
