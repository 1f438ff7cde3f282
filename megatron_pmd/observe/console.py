"""What a person sees in the terminal while a run goes on; plain lines where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import rich.console
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_pmd.config import RunConfig
from megatron_pmd.files import JsonObject
from megatron_pmd.observe.folder import RunFolder
from megatron_pmd.observe.journal import IterationRecord
from megatron_pmd.observe.quantities import MISSING, duration, number, percent, printable, size, when
from megatron_pmd.observe.samples import before_and_after
from megatron_pmd.observe.screens import layout_rows, size_rows

WIDTH = 100
"""Columns used at most: wider tables are harder to read."""

Advance = Callable[..., None]
"""advance(n=1): so many more are done."""


class Console:
    """The driver rank's terminal. What a model or a file said goes through Text: markup in it stays text."""

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        stream = file or sys.stdout
        self.plain = not stream.isatty()
        # a batch job's locale may be C: a symbol it cannot show must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self._rich = rich.console.Console(
            file=stream,
            width=width,
            # also overrules FORCE_COLOR and the like: a log file gets no control characters
            force_terminal=not self.plain,
            color_system=None if self.plain else "auto",
            highlight=False,
            legacy_windows=False,
        )
        if width is None:
            self._rich.width = min(self._rich.width, WIDTH)

    def say(self, message: str) -> None:
        """One plain line, for what fits no table: an engine restarted, a checkpoint written."""
        self._rich.print(Text(printable(message)))

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar that disappears when done; without a terminal, a line at each tenth at most."""
        if self.plain:
            yield self._progress_lines(title, total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._rich, transient=True) as bars:
            task = bars.add_task(title, total=total)

            def advance(n: int = 1) -> None:
                bars.advance(task, n)

            yield advance

    def _progress_lines(self, title: str, total: int) -> Advance:
        done = tenths = 0

        def advance(n: int = 1) -> None:
            nonlocal done, tenths
            done += n
            reached = 10 * done // total if total else 10
            if reached > tenths:
                tenths = reached
                self._rich.print(Text(f"{title}: {done:,} of {total:,}"))

        return advance

    def opening(self, config: RunConfig) -> None:
        """What is about to run: batch arithmetic and layout, the derived numbers worked out."""
        self._rich.print(Rule(Text(f"megatron-pmd · {config.name}", style="bold"), align="left"))
        for title, rows in (("sizes", size_rows(config)), ("layout", layout_rows(config))):
            self._rich.print(Text(title, style="bold cyan"))
            self._rich.print(_rows(rows))

    def iteration(self, record: IterationRecord) -> None:
        """One table: what was learned on the left, where the time went on the right."""
        title = f"iteration {record.number} · {record.number + 1} of {record.planned}"
        self._rich.print(Rule(Text(title, style="bold"), align="left"))
        learned, spent = _rows(_learned(record)), _phases(record.phases)
        beside = Table.grid(padding=(0, 3))
        if self._rich.width >= 76:
            beside.add_row(learned, spent)
        else:
            beside.add_row(learned)
            beside.add_row(spent)
        self._rich.print(beside)

    def closing(self, folder: Path, report: Path | None = None) -> None:
        """How it ended: rewards, evaluations, one prompt's answers at start and end, where the report is."""
        run = RunFolder.read(folder)
        summary = run.summary or {"status": "unfinished"}
        status = summary["status"]
        style = "bold green" if status == "complete" else "bold yellow"
        self._rich.print(
            Rule(Text(f"{run.config.get('name', folder.name)} · {status}", style=style), align="left")
        )
        if summary.get("reason"):
            style = "red" if summary.get("error") else ""
            self._rich.print(Text(printable(summary["reason"]), style=style))
        self._rich.print(_rows(_outcome(run, summary)))
        self._side_by_side(run)
        if report is not None:
            # not wrapped: a path broken over two lines cannot be copied
            self._rich.print(Text(f"report: {report}"), soft_wrap=True)

    def _side_by_side(self, run: RunFolder) -> None:
        files = run.sample_files("evaluations")
        if len(files) < 2:
            return
        first, last = min(files), max(files)
        pair = before_and_after(files[first], files[last], limit=900)
        if pair is None:
            return
        changed = pair[0]["mean_reward"] != pair[1]["mean_reward"]
        chosen = "the first whose grade changed" if changed else "no grade changed: the first"
        self._rich.print(Text(f"\nthe same prompt before and after (problem {pair[0]['problem']}, {chosen})"))
        self._rich.print(Text(printable(pair[0]["prompt"].strip()), style="dim"))
        table = Table(box=box.SQUARE, expand=True, show_lines=False)
        for iteration, prompt in zip((first, last), pair, strict=True):
            grade = f"reward {number(prompt['responses'][0]['reward'])}"
            table.add_column(Text(f"{when(iteration)} · {grade}"), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(p["responses"][0]["text"].strip())) for p in pair))
        self._rich.print(table)


def _rows(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim", min_width=13)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _phases(phases: list[JsonObject]) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="dim")
    table.add_column("phase", no_wrap=True)
    for name in ("time", "share", "moved", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(p["seconds"] for p in phases)
    for p in phases:
        share = percent(p["seconds"] / total) if total else MISSING
        moved = "" if p["bytes"] is None else size(p["bytes"])
        rate = "" if p["gigabytes_per_second"] is None else number(p["gigabytes_per_second"])
        table.add_row(Text(p["phase"]), duration(p["seconds"]), share, moved, rate)
    table.add_row("all", duration(total), "", "", "", style="bold")
    return table


def _mean(steps: list[JsonObject], key: str) -> float | None:
    values = [s[key] for s in steps if s.get(key) is not None]
    return sum(values) / len(values) if values else None


def _learned(record: IterationRecord) -> list[tuple[str, str]]:
    values, steps, evaluation = record.values, record.steps, record.evaluation

    def shown(key: str) -> str:
        """From the iteration's own line, else the mean over its steps."""
        value: Any = values.get(key)
        return number(_mean(steps, key) if value is None else value)

    scored = MISSING
    if evaluation:
        at = "now" if evaluation["iteration"] == record.number else f"at {evaluation['iteration']}"
        scored = f"{number(evaluation.get('mean_at_k'))} {at}"
    last_step = steps[-1] if steps else {}
    rows = [
        ("reward", number(values.get("reward"))),
        ("evaluation", scored),
        ("response", f"{shown('response_tokens')} tokens"),
        ("truncated", percent(values.get("truncated_share"))),
        ("PMD progress", shown("pmd/progress")),
        ("KL to anchor", number(last_step.get("pmd/kl_anchor_k3", values.get("pmd/kl_anchor_k3")))),
        ("mismatch", shown("mismatch/mean_abs")),
        ("sync mismatch", shown("sync/mean_abs_difference")),
        ("gradient norm", shown("gradient_norm")),
        ("rollout tok/s", shown("rollout/tokens_per_second")),
        ("update tok/s", shown("update/tokens_per_second")),
    ]
    if values.get("reward_errors"):
        rows.insert(1, ("reward errors", number(values["reward_errors"])))
    return rows


def _outcome(run: RunFolder, summary: JsonObject) -> list[tuple[str, str]]:
    rewards = [m.get("reward") for m in run.iterations]
    planned = run.config.get("iterations", MISSING)
    rows = [("iterations", f"{len(run.iterations)} of {planned}")]
    if rewards:
        rows.append(("reward", f"{number(rewards[0])} first, {number(rewards[-1])} last"))
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        shown = f"{number(first.get('mean_at_k'))} {when(first['iteration'])}"
        if last is not first:
            shown += f", {number(last.get('mean_at_k'))} {when(last['iteration'])}"
        rows.append(
            ("evaluation", f"{shown} (mean@{last.get('k', 1)}, {last.get('prompts', MISSING)} prompts)")
        )
    if "seconds" in summary:
        slowest = sorted(summary["seconds_by_phase"].items(), key=lambda item: -item[1])[:4]
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in slowest)
        rows.append(("time", f"{duration(summary['seconds'])}: {parts}"))
    return rows
