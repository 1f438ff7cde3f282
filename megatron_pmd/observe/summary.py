"""summary.json: how a run ended and what it came to, for programs."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_pmd.config import RunConfig
from megatron_pmd.files import JsonObject, write_whole
from megatron_pmd.observe.folder import RunFolder, seconds_by_phase
from megatron_pmd.outcome import RunOutcome, Status

SUMMARY = "summary.json"


def write_summary(folder: Path, outcome: RunOutcome, *, wall_seconds: float | None = None) -> JsonObject:
    """Write the summary of what the run's files hold; returns it. DataError if the folder is no run's.

    wall_seconds: of the start that has ended; None: as an earlier summary of it says.
    """
    run = RunFolder.read(folder)
    rewards = [line.get("reward") for line in run.iterations]
    by_phase = seconds_by_phase(run.ledger)
    if wall_seconds is None:
        wall_seconds = (run.summary or {}).get("wall_seconds_of_last_start")
    summary: JsonObject = {
        "name": run.config["name"],
        **outcome.as_json(),
        "iterations": len(run.iterations),
        "iterations_planned": run.config["iterations"],
        "first_reward": rewards[0] if rewards else None,
        "last_reward": rewards[-1] if rewards else None,
        "evaluations": [{k: v for k, v in line.items() if k != "kind"} for line in run.evaluations],
        "seconds": round(sum(by_phase.values()), 3),
        "seconds_by_phase": {name: round(seconds, 3) for name, seconds in by_phase.items()},
        "wall_seconds_of_last_start": None if wall_seconds is None else round(wall_seconds, 3),
    }
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def outcome_of(folder: Path) -> RunOutcome | None:
    """How the last start of a run ended; None while it is under way, and after it was killed."""
    return RunOutcome.read(folder / SUMMARY)


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Whether this very configuration has been trained to its end in this folder."""
    outcome = outcome_of(folder)
    if outcome is None or outcome.status is not Status.COMPLETE:
        return False
    return RunFolder.read(folder).config == config.model_dump(mode="json")
