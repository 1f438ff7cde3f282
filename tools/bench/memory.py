"""The memory of the actor's ranks over whole runs, by phase: what adapters save beside training all weights.

    python -m tools.bench.memory [--setting iterations=2] [--runs FOLDER] [--output bench.json] [RECIPE ...]

Trains each recipe by its own command, one after the other, and looks at its ranks five times a second. The
memory of a rank is its proportional set size: what is its own, and its share of what it has in common with
the launcher that it was forked from, with other ranks and with engines. Engines and reward workers are left
out. A rank's heartbeat says which phase it is in. The first recipe is what the others are compared with.
Held-out rewards stand beside, and the processors' seconds of everything that the command started.
Without GPUs alone: there the memory in question is another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from megatron_pmd.errors import PmdError
from megatron_pmd.files import read_object
from megatron_pmd.heartbeat import Beat
from megatron_pmd.node.watch import TITLE
from megatron_pmd.observe.summary import SUMMARY
from recipes import configuration
from tools.bench.convert import processor_seconds
from tools.bench.loop import ROOT, Row, machine, markdown, row

LOOK_SECONDS = 0.2
SIDES = ["smollm2_135m_cpu", "smollm2_135m_lora_cpu"]


class Looker:
    """The most that the ranks of one launcher hold together, by phase and iteration."""

    def __init__(self, launcher: int) -> None:
        """launcher: the number of the process that forks the ranks."""
        self._launcher = psutil.Process(launcher)
        self.peaks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        """Bytes, in the order in which the phases were first seen."""

    def look(self) -> None:
        beat, held = self._beat(), 0
        for process in self._launcher.children():
            try:
                if re.match(TITLE, " ".join(process.cmdline())):
                    held += process.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        if beat and held:
            of_phase = self.peaks[beat.phase]
            of_phase[beat.iteration] = max(of_phase[beat.iteration], held)

    def _beat(self) -> Beat | None:
        """The first rank's: its file is the first of the launcher's that is called so."""
        descriptors = Path(f"/proc/{self._launcher.pid}/fd")
        try:
            files = sorted(descriptors.iterdir(), key=lambda file: int(file.name))
            beats = [file for file in files if os.readlink(file).startswith("/memfd:heartbeat")]
        except OSError:  # it has ended, or closes files just now
            return None
        return Beat.read(beats[0]) if beats else None


def measured(recipe: str, settings: list[str], runs: Path) -> dict[str, Any]:
    """Train it to its end. Gigabytes by phase and iteration, held-out rewards, seconds.

    Raises PmdError when the run does not end well.
    """
    folder = runs / configuration(recipe, settings).name
    command = [sys.executable, "-m", "megatron_pmd.cli.main", "train", recipe, *settings, "--runs", str(runs)]
    begun, processor = time.perf_counter(), processor_seconds()
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        looker = Looker(process.pid)
        while process.poll() is None:
            looker.look()
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise PmdError(f"{' '.join(command)} ended with {process.returncode}; its files are in {folder}")
    summary = read_object(folder / SUMMARY) or {}
    return {
        "recipe": recipe,
        "gigabytes": {
            phase: {iteration: held / 1e9 for iteration, held in own.items()}
            for phase, own in looker.peaks.items()
        },
        "rewards": [evaluation["mean_at_k"] for evaluation in summary["evaluations"]],
        "processor_seconds": processor_seconds() - processor,
        "seconds": time.perf_counter() - begun,
    }


def table(sides: list[dict[str, Any]]) -> list[Row]:
    """Each figure of the first recipe, then the others' with their ratio to it."""
    rows: list[Row] = []

    def compare(what: str, figures: list[float], unit: str) -> None:
        first, *others = (
            row(f"{what}, {side['recipe']}", [figure], unit)
            for side, figure in zip(sides, figures, strict=True)
        )
        rows.extend([first, *(other | {"ratio": other["value"] / first["value"]} for other in others)])

    peaks = [{phase: max(own.values()) for phase, own in side["gigabytes"].items()} for side in sides]
    compare("all ranks, the most of the run", [max(own.values()) for own in peaks], "GB")
    for phase in peaks[0]:
        if all(phase in own for own in peaks):  # a short one may not be seen
            compare(f"in {phase}", [own[phase] for own in peaks], "GB")
    if all(side["rewards"] for side in sides):
        compare("held-out reward at the end", [side["rewards"][-1] for side in sides], "")
    compare("processors", [side["processor_seconds"] for side in sides], "s")
    compare("clock", [side["seconds"] for side in sides], "s")
    return rows


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help=f"by default {' '.join(SIDES)}")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="dotted.key=value, for each recipe")] = None,
    runs: Annotated[Path | None, typer.Option(help="keeps the runs; by default they are removed")] = None,
    output: Annotated[Path, typer.Option(help="all figures as JSON, of each iteration")] = Path("bench.json"),
) -> None:
    """Measure, print a Markdown table, write JSON."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        at = machine()
        sides = [measured(recipe, setting or [], runs or Path(scratch)) for recipe in recipes or SIDES]
    rows = table(sides)
    print(markdown("memory of the actor", rows), flush=True)
    output.write_text(json.dumps({"machine": at, "sides": sides, "memory": rows}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PmdError as error:
        sys.exit(f"{type(error).__name__}: {error}")
