"""The run directory as it is written. Only the driver rank has a Journal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError
from megatron_pmd.files import JsonObject, read_object, read_records, write_whole
from megatron_pmd.observe.folder import flatten
from megatron_pmd.observe.quantities import finite
from megatron_pmd.observe.summary import write_summary
from megatron_pmd.observe.trackers import AXIS, TrackerSet
from megatron_pmd.observe.versions import versions
from megatron_pmd.outcome import RunOutcome

Kind = Literal["step", "iteration", "evaluation", "warm_start"]


@dataclass
class Phase:
    """One line of the ledger while it is being measured; the caller fills in what it knows."""

    name: str
    bytes: int | None = None
    """Bytes moved by the phase."""
    actor_bytes: int | None = None
    """Resident memory of the actor ranks at the end of the phase."""
    engine_bytes: int | None = None
    """Resident memory of the engines at the end of the phase."""
    subphases: list[JsonObject] = field(default_factory=list)
    """As subphases.together() gives them; what they leave of the seconds is the phase's own."""
    seconds: float = 0.0
    """Set when the phase has ended."""


@dataclass
class IterationRecord:
    """What the journal holds of one iteration; what the console prints."""

    number: int
    planned: int
    values: JsonObject
    """The `iteration` line."""
    steps: list[JsonObject] = field(default_factory=list)
    phases: list[JsonObject] = field(default_factory=list)
    evaluation: JsonObject | None = None
    """The latest evaluation so far."""


class Journal:
    """Metrics, ledger and summary of one run, and what trackers show of it."""

    def __init__(self, folder: Path, config: RunConfig, iteration: int, say: Callable[[str], None]) -> None:
        """Use Journal.open, which prepares the folder."""
        self.folder = folder
        self._config = config
        self._iteration = iteration
        metrics = read_records(folder / "metrics.jsonl")
        self._iterations = [m for m in metrics if m["kind"] == "iteration"]
        self._evaluations = [m for m in metrics if m["kind"] == "evaluation"]
        self._steps: list[JsonObject] = []
        self._ledger = read_records(folder / "ledger.jsonl")
        self._phase: Phase | None = None
        self._opened = time.monotonic()
        logged = {kind: max(_axis_values(metrics, kind), default=-1) for kind in AXIS}
        self._trackers = TrackerSet(folder, config, logged, say)
        self._metrics_file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._ledger_file = (folder / "ledger.jsonl").open("a", encoding="utf-8")

    @classmethod
    def open(
        cls,
        folder: Path,
        config: RunConfig,
        resume_iteration: int,
        *,
        keep_warm_start: bool = False,
        say: Callable[[str], None] = print,
    ) -> Journal:
        """Create the run directory, or continue it at `resume_iteration`, the next iteration to be trained.

        say: to the user, what goes wrong with a tracker later.
        Lines of that iteration and later ones are dropped, since they are made again; so are lines
        without an iteration (the warm start) when the run begins again at 0, unless keep_warm_start.
        Raises ConfigError for the folder of a run with another configuration that has trained something.
        """
        recorded = read_object(folder / "config.json")
        given = config.model_dump(mode="json")
        if recorded is None:
            _refuse_strange_folder(folder, resume_iteration)
        elif keep_warm_start or resume_iteration or _has_trained(folder):
            _refuse_differences(folder, recorded, given)
        for name in ("rollouts", "evaluations", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # a summary speaks of a run that has ended
        (folder / "summary.json").unlink(missing_ok=True)
        if recorded != given:
            write_whole(folder / "config.json", json.dumps(given, indent=2) + "\n")
        _record_versions(folder / "versions.json")
        for name in ("metrics.jsonl", "ledger.jsonl"):
            _keep_before(folder / name, resume_iteration, keep_warm_start or resume_iteration > 0)
        return cls(folder, config, resume_iteration, say)

    def iteration(self, t: int) -> None:
        """Iteration t begins: lines and phases from here on are its own. After the last, t = iterations."""
        self._iteration = t
        self._steps = []

    def log(self, kind: Kind, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and send its numbers to the trackers."""
        if kind not in AXIS:
            raise ValueError(f"metrics of kind {kind!r}; known: {', '.join(AXIS)}")
        line: JsonObject = {"kind": kind}
        if kind != "warm_start":
            line["iteration"] = self._iteration
        line |= finite(dict(values))
        if line.get(AXIS[kind]) is None:
            raise ValueError(f"a metrics line of kind {kind!r} needs {AXIS[kind]!r}; got {sorted(values)}")
        _append(self._metrics_file, line)
        if kind == "step":
            self._steps.append(line)
        elif kind == "iteration":
            self._iterations.append(line)
        elif kind == "evaluation":
            self._evaluations.append(line)
        self._trackers.log(kind, line)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase; its line goes to the ledger when it ends, also when it ends with an error."""
        if self._phase is not None:
            raise RuntimeError(
                f"phase {name!r} inside phase {self._phase.name!r}: their times would count twice"
            )
        self._phase = phase = Phase(name)
        begun = time.perf_counter()
        error: str | None = None
        try:
            yield phase
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            phase.seconds = time.perf_counter() - begun
            self._phase = None
            self._enter(phase, error)

    def _enter(self, phase: Phase, error: str | None) -> None:
        rate = None if phase.bytes is None else phase.bytes / max(phase.seconds, 1e-9) / 1e9
        line: JsonObject = {
            "iteration": self._iteration,
            "phase": phase.name,
            "seconds": round(phase.seconds, 6),
            "bytes": phase.bytes,
            "gigabytes_per_second": rate,
            "actor_bytes": phase.actor_bytes,
            "engine_bytes": phase.engine_bytes,
        }
        if phase.subphases:
            line["subphases"] = phase.subphases
        if error:
            line["error"] = error
        line = finite(line)
        self._ledger.append(line)
        _append(self._ledger_file, line)

    def record(self, t: int | None = None) -> IterationRecord:
        """Iteration t as logged so far, None: the current one. Steps are kept for the current one only."""
        t = self._iteration if t is None else t
        values = [m for m in self._iterations if m["iteration"] == t]
        return IterationRecord(
            number=t,
            planned=self._config.iterations,
            values=values[-1] if values else {},
            steps=self._steps if t == self._iteration else [],
            phases=[line for line in self._ledger if line["iteration"] == t],
            evaluation=self._evaluations[-1] if self._evaluations else None,
        )

    def iterations_before(self, t: int) -> list[JsonObject]:
        """The `iteration` lines of the iterations before t, oldest first."""
        return [m for m in self._iterations if m["iteration"] < t]

    def finish(self, outcome: RunOutcome) -> JsonObject:
        """Close every file, write summary.json, and close the trackers' records; returns the summary."""
        self.close()
        summary = write_summary(self.folder, outcome, wall_seconds=time.monotonic() - self._opened)
        # last: their servers may not answer
        self._trackers.close(outcome)
        return summary

    def close(self) -> None:
        """Close every file without a summary, and leave the trackers' records open: as a killed run does."""
        self._metrics_file.close()
        self._ledger_file.close()


def _append(file: TextIO, line: JsonObject) -> None:
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def _axis_values(metrics: list[JsonObject], kind: str) -> list[int]:
    return [m[AXIS[kind]] for m in metrics if m["kind"] == kind]


def _keep_before(path: Path, iteration: int, keep_warm_start: bool) -> None:
    """Drop the lines of `iteration` and later ones, and a line cut off at the end."""
    without = -1 if keep_warm_start else iteration
    kept = [line for line in read_records(path) if line.get("iteration", without) < iteration]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.exists() and path.read_bytes() != text.encode():
        write_whole(path, text)


def _record_versions(path: Path) -> None:
    """What this start runs with; what earlier starts ran with stays listed if it was different."""
    now = versions()
    before = read_object(path)
    if before is None:
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    earlier = before.pop("earlier_starts", [])
    if before != now:
        write_whole(path, json.dumps({**now, "earlier_starts": [*earlier, before]}, indent=2) + "\n")


def _has_trained(folder: Path) -> bool:
    """Whether an optimizer step of the run is recorded: a start that failed before is no run to protect."""
    return any(line["kind"] in ("step", "iteration") for line in read_records(folder / "metrics.jsonl"))


def _refuse_strange_folder(folder: Path, resume_iteration: int) -> None:
    if (folder / "metrics.jsonl").exists() or (folder / "ledger.jsonl").exists():
        raise ConfigError(
            f"{folder} holds metrics of a run but no config.json; use another name, or move it away"
        )
    if resume_iteration:
        raise ConfigError(f"{folder} holds no run: it cannot be resumed at iteration {resume_iteration}")


def _refuse_differences(folder: Path, recorded: JsonObject, given: JsonObject) -> None:
    there, here = flatten(recorded), flatten(given)
    keys = [k for k in {**there, **here} if there.get(k, ...) != here.get(k, ...)]
    if "iterations" in keys and here["iterations"] > there.get("iterations", 0):
        keys.remove("iterations")
    keys = [k for k in keys if not k.startswith(("alarms.", "trackers."))]
    if keys:
        listed = "\n".join(f"  {k}: {_shown(there, k)} there, {_shown(here, k)} here" for k in keys)
        raise ConfigError(
            f"{folder / 'config.json'} is of a run with another configuration:\n{listed}\n"
            "give this run another name, or the recorded values to resume "
            "(only iterations may grow, and alarms and trackers change)"
        )


def _shown(leaves: JsonObject, key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "absent"
