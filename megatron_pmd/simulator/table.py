"""Played runs on the screen, one a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.comparing import Play


def name_of(played: Played) -> str:
    rules = played.scenario.rules
    if rules.staleness is not None:
        return f"overlapped, n={rules.staleness}"
    if rules.partial and rules.partial.extra_groups:
        return f"partial, +{rules.partial.extra_groups}"
    return played.scenario.mode


def devices_of(played: Played) -> str:
    scenario = played.scenario
    if scenario.mode != "overlapped":
        return f"{scenario.devices:,}"
    return f"{scenario.fleet.count * scenario.fleet.devices_each:,} + {scenario.trainer.devices:,}"


def show(title: str, runs: Sequence[Played], how: Play, console: Console | None = None) -> None:
    """Print the runs and what they were played with."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for played in runs:
        table.add_column(name_of(played).replace(", ", "\n"), justify="right", min_width=10)
    first = runs[0].samples_per_second
    rows: list[tuple[str, Callable[[Played], str]]] = [
        ("engines + trainer", devices_of),
        ("seconds per rollout", lambda p: f"{p.rollout_seconds:,.1f}"),
        ("samples/s", lambda p: f"{p.samples_per_second:,.2f}"),
        ("  to the first run", lambda p: f"{p.samples_per_second / first:.2f} x"),
        ("tokens/s per device", lambda p: f"{p.tokens_per_second_and_device:,.0f}"),
        ("trainer waits", lambda p: _percent(p.trainer_waits)),
        ("engine slots in use", lambda p: _percent(p.slots_used)),
        ("devices idle", lambda p: _percent(p.device_shares["idle"])),
        ("staleness: mean, most", lambda p: f"{p.mean_staleness:.2f}, {p.max_staleness}"),
        ("failures: run, engine", lambda p: f"{p.failures}, {p.engine_failures}"),
        ("time lost to failures", lambda p: _percent(p.time_lost)),
        ("thrown away: stale, lost", lambda p: f"{p.accounts.dropped:,}, {p.accounts.lost:,}"),
    ]
    for label, cell in rows:
        table.add_row(label, *map(cell, runs))
    console = console or Console()
    console.print(table)
    failures = how.failures
    hours = 1 / failures.per_device_second / 3600 if failures.per_device_second else None
    words = [
        f"{how.iterations} iterations, of which the first {how.warm_up} do not count; seed {how.seed}.",
        f"Response lengths: {how.lengths.words}.",
        f"A device fails every {hours:,.0f} hours, and a restart takes {failures.restart_seconds:,.0f} s."
        if hours
        else "Nothing fails.",
        "Speeds are the plan's, whose assumptions `megatron-pmd plan` prints.",
    ]
    console.print(Text(" ".join(words), style="dim"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
