"""The report's curves as plotly figures; colours of text and grid are left to the page."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field

import plotly.graph_objects as go

from megatron_pmd.files import JsonObject
from megatron_pmd.observe.folder import RunFolder
from megatron_pmd.observe.quantities import when

# readable on white and on near-black, and told apart by people who confuse red and green
BLUE, ORANGE, GREEN, PURPLE, PINK = "#3d85c6", "#e0871b", "#2a9d7c", "#8f78d8", "#d0609a"
PHASE_COLOURS = {
    "start": "#8a8f98",
    "warm_start": "#b08968",
    "evaluate": PURPLE,
    "rollout": BLUE,
    "release": "#7fc4dd",
    "anchor": "#d9b53f",
    "update": ORANGE,
    "save": PINK,
    "sync": GREEN,
    "resume": "#9bc76d",
}
CURVE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, PINK)
SOURCE = "source/"
"""Metrics of one source of a mixture: source/NAME/…"""
SPARE_COLOURS = ("#c25b4e", "#5f6fb5", "#6b8e23", "#a0527a")


@dataclass
class Chart:
    """A figure and what the page writes around it: a legend in HTML cannot lie over the curves."""

    title: str
    note: str
    figure: go.Figure
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Name and colour of each curve; empty for a single one."""


@dataclass
class Series:
    name: str
    x: list[float]
    y: list[float | None]
    hover: list[str]
    colour: str
    marks: bool = False
    """Points to be seen as such: evaluations."""


def charts(run: RunFolder) -> list[Chart]:
    """Curves of everything the run has logged, the important ones first; an empty one is left out."""
    made = [
        _curves(
            "Reward",
            "mean of each rollout; evaluations are made before the iteration trains",
            _series(run, "reward", "training", BLUE),
            _evaluated(run, "mean_at_k", "evaluation, mean@k", ORANGE),
            _evaluated(run, "pass_at_k", "evaluation, pass@k", PURPLE) if _several(run) else None,
        ),
        _curves(
            "Response length",
            "mean tokens",
            _series(run, "response_tokens", "training", BLUE, kinds=("iteration",)),
            _evaluated(run, "response_tokens", "evaluation", ORANGE),
        ),
        *_by_source(run),
        _curves("Truncated responses", "share of the rollout", _series(run, "truncated_share", "", PINK)),
        _curves("PMD progress", "every optimizer step", _series(run, "pmd/progress", "", GREEN)),
        _curves(
            "KL to the anchor",
            "k3 estimate, every optimizer step",
            _series(run, "pmd/kl_anchor_k3", "", PURPLE),
        ),
        _curves(
            "Mismatch of log-probabilities",
            "mean |log π actor − log π engine|",
            _series(run, "mismatch/mean_abs", "while training", PINK),
            _series(run, "sync/mean_abs_difference", "after sync", GREEN),
            logarithmic=True,
        ),
        _curves(
            "Gradient norm",
            "before clipping, every optimizer step",
            _series(run, "gradient_norm", "", ORANGE),
        ),
        _curves("Loss", "every optimizer step", _series(run, "loss", "", BLUE, kinds=("step",))),
        _curves(
            "Throughput",
            "tokens per second",
            _series(run, "rollout/tokens_per_second", "rollout", BLUE),
            _series(run, "update/tokens_per_second", "update", ORANGE),
        ),
        _warm_start(run),
    ]
    return [_aligned(chart, run) for chart in made if chart is not None]


def other_charts(run: RunFolder) -> list[Chart]:
    """One chart for each number logged that no other chart shows, by name."""
    shown = {
        *("reward", "mean_at_k", "pass_at_k", "response_tokens", "truncated_share", "gradient_norm", "loss"),
        *("pmd/progress", "pmd/kl_anchor_k3", "mismatch/mean_abs", "sync/mean_abs_difference"),
        *(
            "rollout/tokens_per_second",
            "update/tokens_per_second",
            "kind",
            "iteration",
            "step",
            "global_step",
        ),
    }
    lines = run.of_kind("step") + run.iterations
    keys = {k for m in lines for k, v in m.items() if isinstance(v, (int, float))} - shown
    keys = {key for key in keys if not key.startswith(SOURCE)}
    made = [_curves(key, "", _series(run, key, "", BLUE)) for key in sorted(keys)]
    return [_aligned(chart, run) for chart in made if chart is not None]


def spec(figure: go.Figure) -> JsonObject:
    """What Plotly.newPlot takes."""
    # plotly's own encoder: it leaves out what is not set
    plain: JsonObject = json.loads(figure.to_json())
    return {"data": plain["data"], "layout": plain["layout"]}


def phase_colours(names: list[str]) -> dict[str, str]:
    spare = iter(SPARE_COLOURS * (1 + len(names) // len(SPARE_COLOURS)))
    return {name: PHASE_COLOURS.get(name) or next(spare) for name in names}


def phase_bars(run: RunFolder, colours: dict[str, str]) -> go.Figure:
    """Seconds of every phase, stacked, one bar an iteration."""
    figure = go.Figure()
    for name, colour in colours.items():
        seconds: Counter[int] = Counter()
        for line in run.ledger:
            if line["phase"] == name:
                seconds[line["iteration"]] += line["seconds"]
        figure.add_bar(
            x=list(seconds),
            y=[_rounded(s) for s in seconds.values()],
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{name}, iteration %{{x}}: %{{y:.4~g}} s<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.15)
    return _dressed(figure, x_title="iteration", y_title="seconds")


def _by_source(run: RunFolder) -> list[Chart | None]:
    """One curve for each source of a mixture; nothing where there is only one."""
    keys = [key for m in (*run.iterations, *run.evaluations) for key in m if key.startswith(SOURCE)]
    names = list(dict.fromkeys(key.split("/")[1] for key in keys))
    colours = dict(zip(names, itertools.cycle(CURVE_COLOURS), strict=False))

    def trained(key: str) -> list[Series | None]:
        return [_series(run, f"{SOURCE}{name}/{key}", name, colours[name]) for name in names]

    def evaluated(key: str) -> list[Series | None]:
        return [_evaluated(run, f"{SOURCE}{name}/{key}", name, colours[name]) for name in names]

    return [
        _curves("Reward by source", "mean of each rollout", *trained("reward")),
        _curves("Correct responses by source", "share of the rollout", *trained("correct")),
        _curves("Response length by source", "mean tokens of each rollout", *trained("response_tokens")),
        _curves("Groups with signal by source", "not every advantage is 0", *trained("groups_with_signal")),
        _curves("Evaluation by source", "mean@k", *evaluated("mean_at_k")),
        _curves("Evaluation by source, pass@k", "pass@k", *evaluated("pass_at_k")) if _several(run) else None,
    ]


def _several(run: RunFolder) -> bool:
    return any((m.get("k") or 1) > 1 for m in run.evaluations)


def _series(
    run: RunFolder, key: str, name: str, colour: str, kinds: tuple[str, ...] = ("step", "iteration")
) -> Series | None:
    """A metric of the optimizer steps if they have it, else of the iterations."""
    for kind in kinds:
        lines = [m for m in run.of_kind(kind) if key in m]
        if lines:
            place = _step_places(lines) if kind == "step" else [float(m["iteration"]) for m in lines]
            hover = [_where(m) for m in lines]
            return Series(name, place, [_rounded(m[key]) for m in lines], hover, colour)
    return None


def _evaluated(run: RunFolder, key: str, name: str, colour: str) -> Series | None:
    lines = [m for m in run.evaluations if key in m]
    if not lines:
        return None
    own = key[: key.rfind("/") + 1]  # a source's prompts are fewer than all
    hover = [
        f"{when(m['iteration'])}, {m.get(f'{own}prompts', '?')} prompts, k = {m.get('k', 1)}" for m in lines
    ]
    y = [_rounded(m[key]) for m in lines]
    return Series(name, [float(m["iteration"]) for m in lines], y, hover, colour, marks=True)


def _warm_start(run: RunFolder) -> Chart | None:
    lines = [m for m in run.of_kind("warm_start") if "loss" in m]
    if not lines:
        return None
    y = [_rounded(m["loss"]) for m in lines]
    series = Series("", [m["step"] for m in lines], y, [f"step {m['step']}" for m in lines], BLUE)
    return _curves("Warm start", "supervised loss before the first iteration", series, x_title="step")


def _step_places(lines: list[JsonObject]) -> list[float]:
    """Steps of iteration t lie evenly in [t, t + 1)."""
    count = Counter(m["iteration"] for m in lines)
    seen: Counter[int] = Counter()
    places = []
    for m in lines:
        t = m["iteration"]
        places.append(round(t + seen[t] / count[t], 4))
        seen[t] += 1
    return places


def _where(m: JsonObject) -> str:
    if m["kind"] == "step":
        return f"iteration {m['iteration']}, step {m.get('step')} ({m.get('global_step')} in all)"
    return f"iteration {m['iteration']}"


def _curves(
    title: str, note: str, *given: Series | None, logarithmic: bool = False, x_title: str = "iteration"
) -> Chart | None:
    series = [s for s in given if s is not None]
    if not series:
        return None
    figure = go.Figure()
    for s in series:
        # a curve of one point would be invisible as a line
        few = s.marks or len(s.x) < 30
        figure.add_scatter(
            x=s.x,
            y=s.y,
            name=s.name,
            mode="lines+markers" if few else "lines",
            line={"color": s.colour, "width": 1.8, "dash": "dot" if s.marks else "solid"},
            marker={"size": 9 if s.marks else 5, "symbol": "diamond" if s.marks else "circle"},
            text=s.hover,
            hovertemplate="%{y:.4~g}<br>%{text}<extra></extra>",
        )
    missing = sum(y is None for s in series for y in s.y)
    if missing:
        note += f"; {missing} {'value was' if missing == 1 else 'values were'} not finite"
    if _scale(figure, [y for s in series for y in s.y if y is not None], logarithmic):
        note += ", logarithmic"
    legend = [(s.name, s.colour) for s in series if s.name] if len(series) > 1 or series[0].marks else []
    return Chart(title, note, _dressed(figure, x_title=x_title), legend)


def _scale(figure: go.Figure, values: list[float], logarithmic: bool) -> bool:
    """Set the vertical axis where plotly's own choice is hard to read; True if it is logarithmic."""
    if not values:
        return False
    least, most = min(values), max(values)
    # a logarithmic axis leaves out zeros without a word, and over less than a factor of 5 it may have no tick
    if logarithmic and 0 < 5 * least <= most:
        lowest, highest = math.floor(math.log10(least)), math.ceil(math.log10(most))
        # within a decade or two, powers of ten alone would leave one tick
        marks = (1, 2, 5) if highest - lowest <= 2 else (1,)
        ticks = [m * 10.0**e for e in range(lowest - 1, highest + 1) for m in marks]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:.0e}" for tick in ticks])
        return True
    if least == most:
        # plotly would show one unit to each side: a constant learning rate of 1e-5 looked like 0
        reach = abs(most) or 1.0
        figure.update_yaxes(range=[min(0.0, most - reach), most + reach])
    return False


def _aligned(chart: Chart, run: RunFolder) -> Chart:
    """The same iterations on every horizontal axis."""
    if chart.figure.layout.xaxis.title.text == "iteration":
        # steps of iteration t reach up to t + 1; an evaluation lies at t
        ends = [m["iteration"] + (m["kind"] != "evaluation") for m in run.metrics if "iteration" in m]
        last = max(ends, default=1) or 1
        # in a short run plotly would number fractions of iterations
        chart.figure.update_xaxes(range=[-0.03 * last, 1.02 * last], dtick=1 if last <= 8 else None)
    return chart


def _dressed(figure: go.Figure, x_title: str, y_title: str = "") -> go.Figure:
    figure.update_layout(
        template="none",
        height=250,
        margin={"l": 8, "r": 12, "t": 10, "b": 8},
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        dragmode=False,
    )
    figure.update_xaxes(
        title={"text": x_title, "standoff": 6},
        automargin=True,
        zeroline=False,
        showgrid=False,
        ticks="outside",
    )
    figure.update_yaxes(
        title={"text": y_title, "standoff": 6},
        automargin=True,
        zeroline=False,
        nticks=6,
        # plotly's default writes 1e-5 as 10µ
        exponentformat="e",
    )
    return figure


def _rounded(value: float | None) -> float | None:
    """Six significant digits: the page holds thousands of these."""
    return None if value is None else float(f"{value:.6g}")
