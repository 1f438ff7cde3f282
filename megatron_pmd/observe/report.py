"""The run as one HTML file: no network, no server, can be mailed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_pmd.files import JsonObject, write_whole
from megatron_pmd.observe import quantities
from megatron_pmd.observe.charts import charts, other_charts, phase_bars, phase_colours, spec
from megatron_pmd.observe.folder import RunFolder, flatten, seconds_by_phase
from megatron_pmd.observe.samples import Label, evenly, grades, read_prompts

ITERATIONS = 40
PROMPTS = 8
RESPONSES = 8
SAMPLE_CHARACTERS = 8_000_000
"""Of responses in the whole page: with many or long ones, each is shortened in its middle."""
RESPONSE_CHARACTERS = (500, 6000)
"""The least and the most of one response that is kept."""


@dataclass
class Tile:
    """A headline number."""

    name: str
    value: str
    note: str = ""


@dataclass
class PhaseRow:
    name: str
    colour: str | None
    """None: a part of the phase above."""
    count: int
    seconds: float
    share: float
    bytes: int | None
    rate: float | None
    """Gigabytes per second, over the phases that moved bytes."""
    actor_bytes: int | None
    engine_bytes: int | None


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory, finished or not: its report.html, or out; returns the path."""
    run = RunFolder.read(run_folder)
    drawn = charts(run)
    names = list(seconds_by_phase(run.ledger))
    colours = phase_colours(names)
    specs = {f"curve-{i}": spec(chart.figure) for i, chart in enumerate(drawn)}
    others = other_charts(run)
    specs |= {f"other-{i}": spec(chart.figure) for i, chart in enumerate(others)}
    if names:
        specs["phases"] = spec(phase_bars(run, colours))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_pmd.observe"),
        # not by file name: everything that a run recorded is foreign text
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": quantities.number,
        "percent": quantities.percent,
        "duration": quantities.duration,
        "size": quantities.size,
    }
    page = environment.get_template("report.html.j2").render(
        name=run.config.get("name", run_folder.name),
        status=(run.summary or {}).get("status", "unfinished"),
        reason=(run.summary or {}).get("reason"),
        model=(run.config.get("model") or {}).get("path", ""),
        tiles=_tiles(run),
        charts=drawn,
        others=others,
        phases=_phase_rows(run, colours),
        memory=any(line.get("actor_bytes") or line.get("engine_bytes") for line in run.ledger),
        config=_shown(run.config),
        versions=_shown(run.versions),
        data={"charts": specs, "samples": _samples(run)},
        plotly=Markup(_plotly()),
    )
    path = out or run_folder / "report.html"
    write_whole(path, page)
    return path


def _plotly() -> str:
    script: str = get_plotlyjs()
    # inside a script element only its own end tag is special
    return script.replace("</script", r"<\/script")


def _tiles(run: RunFolder) -> list[Tile]:
    shown = quantities.number
    planned = run.config.get("iterations", quantities.MISSING)
    seconds = sum(line["seconds"] for line in run.ledger)
    tiles = [Tile("Iterations", f"{len(run.iterations)}", f"of {planned}")]
    rewards = [m.get("reward") for m in run.iterations]
    if rewards:
        tiles.append(Tile("Training reward", shown(rewards[-1]), f"first {shown(rewards[0])}"))
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        note = f"mean@{last.get('k', 1)}, {last.get('prompts', '?')} prompts"
        if last is not first:
            note = f"first {shown(first.get('mean_at_k'))}; {note}"
        tiles.append(Tile("Evaluation", shown(last.get("mean_at_k")), note))
    differences = [m["sync/mean_abs_difference"] for m in run.metrics if m.get("sync/mean_abs_difference")]
    if differences:
        tiles.append(Tile("Engine vs actor", shown(max(differences)), "largest mean |Δ log π| after a sync"))
    if seconds:
        starts = 1 + len(run.versions.get("earlier_starts", []))
        note = "in all phases" + (f", {starts} different set-ups" if starts > 1 else "")
        tiles.append(Tile("Time", quantities.duration(seconds), note))
    return tiles


def _phase_rows(run: RunFolder, colours: dict[str, str]) -> list[PhaseRow]:
    """Each phase, and below it what it consists of."""
    by_phase = seconds_by_phase(run.ledger)
    total = sum(by_phase.values()) or 1.0
    rows = []
    for name in by_phase:
        lines = [line for line in run.ledger if line["phase"] == name]
        rows.append(_phase_row(name, lines, total, colours[name]))
        subphases: dict[str, list[JsonObject]] = {}
        for found in (subphase for line in lines for subphase in line.get("subphases") or []):
            subphases.setdefault(found["subphase"], []).append(found)
        rows += [_phase_row(name, found, total, None) for name, found in subphases.items()]
    return rows


def _phase_row(name: str, lines: list[JsonObject], total: float, colour: str | None) -> PhaseRow:
    seconds = sum(line["seconds"] or 0.0 for line in lines)
    moving = [line for line in lines if line.get("bytes") is not None]
    moved = sum(line["bytes"] for line in moving) if moving else None
    while_moving = sum(line["seconds"] for line in moving)
    return PhaseRow(
        name=name,
        colour=colour,
        count=len(lines),
        seconds=seconds,
        share=seconds / total,
        bytes=moved,
        rate=moved / while_moving / 1e9 if moved and while_moving else None,
        actor_bytes=max((line.get("actor_bytes") or 0 for line in lines), default=0) or None,
        engine_bytes=max((line.get("engine_bytes") or 0 for line in lines), default=0) or None,
    )


def _shown(tree: JsonObject) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if value is None or value == [] or value == {}:
            return quantities.MISSING
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [(key, text(value)) for key, value in flatten(tree).items()]


def _samples(run: RunFolder) -> JsonObject:
    """What the sample browser shows: of each kind, some iterations, of each some prompts and responses."""
    files = {kind: run.sample_files(kind) for kind in ("rollouts", "evaluations")}
    chosen = {kind: evenly(list(found), ITERATIONS) for kind, found in files.items()}
    count = max(1, sum(map(len, chosen.values()))) * PROMPTS * RESPONSES
    least, most = RESPONSE_CHARACTERS
    limit = max(least, min(most, SAMPLE_CHARACTERS // count))
    embedded: JsonObject = {}
    for kind, iterations in chosen.items():
        evaluated = evenly(_problems(files[kind], iterations), PROMPTS) if kind == "evaluations" else None
        embedded[kind] = [_sampled(files[kind][t], t, evaluated, limit) for t in iterations]
    # a note in the page says what it does not hold
    embedded["left_out"] = {kind: len(files[kind]) - len(chosen[kind]) for kind in files}
    return embedded


def _problems(files: dict[int, Path], iterations: list[int]) -> list[Label]:
    """Problems of the first evaluation that the last one has too, so that they can be compared."""
    if not iterations:
        return []
    last = grades(files[iterations[-1]])
    return [problem for problem in grades(files[iterations[0]]) if problem in last]


def _sampled(path: Path, iteration: int, problems: list[Label] | None, limit: int) -> JsonObject:
    found = grades(path)
    groups = [group for means in found.values() for group in means]
    if problems:
        kept = [next(iter(found[p])) for p in problems if p in found]
    else:
        kept = evenly(sorted(groups), PROMPTS)
    return {
        "iteration": iteration,
        "groups": len(groups),
        "prompts": read_prompts(path, kept, RESPONSES, limit),
    }
