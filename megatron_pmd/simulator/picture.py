"""Played runs as a picture: what the devices do, and samples over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_pmd.observe.charts import CURVE_COLOURS, PHASE_COLOURS
from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.table import name_of

COLOURS = {
    "decode": PHASE_COLOURS["rollout"],
    "train": PHASE_COLOURS["update"],
    "sync": PHASE_COLOURS["sync"],
    "save": PHASE_COLOURS["save"],
    "lost to failures": "#c25b4e",
    "idle": "#d9d9d9",
}


def figure(title: str, runs: Sequence[Played]) -> go.Figure:
    """Left, the devices' time by what they do; right, samples trained on over the hours."""
    titles = ("share of the devices' time", "samples trained on")
    made = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    names = [name_of(played) for played in runs]
    for what, colour in COLOURS.items():
        shares = [played.device_shares[what] for played in runs]
        made.add_bar(
            x=names, y=shares, name=what, marker_color=colour, row=1, col=1,
            hovertemplate=f"{what}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    for played, name, colour in zip(runs, names, _colours(len(runs)), strict=True):
        made.add_scatter(
            x=[end / 3600 for end in played.ends],
            y=played.trained,
            name=f"{name}: {played.samples_per_second:,.2f} samples/s", line_color=colour, row=1, col=2,
        )  # fmt: skip
    made.update_layout(title=title, barmode="stack", template="plotly_white")
    made.update_yaxes(tickformat=".0%", row=1, col=1)
    made.update_xaxes(title="hours", row=1, col=2)
    return made


def _colours(count: int) -> list[str]:
    return [CURVE_COLOURS[number % len(CURVE_COLOURS)] for number in range(count)]


def write(title: str, runs: Sequence[Played], path: Path) -> None:
    """One HTML file that needs no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(title, runs).write_html(path, include_plotlyjs=True)
