"""The starts of a run on Slurm: one JSON object a line in runs/NAME/launch/history.jsonl.

The batch script writes it (node/job.py), `megatron-pmd status` shows it. Python's library alone: the batch
script runs with the host's own Python. Lines, each with the time at which it was written:

    {"event": "submitted", "job": "5"}
    {"event": "begun", "attempt": 1, "job": "5", "nodes": "n[1-2]", "checkpoint": "iteration-4"}
    {"event": "ended", "attempt": 1, "status": "failed", "reason": "n2: …", "error": "EngineError"}
    {"event": "stopped", "reason": "crashed 3 times without a new checkpoint; …"}
    {"event": "not_requeued", "reason": "could not be requeued; …"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_pmd.outcome import RunOutcome, Status


@dataclass(frozen=True)
class Attempt:
    """One start of the run: once through the batch script."""

    number: int
    """Counted over all jobs of the run, from 1."""
    job: str
    """Slurm's number of it."""
    nodes: str
    """As Slurm writes them: n[1-4]."""
    checkpoint: str | None
    """The newest when it began; None: it began at the start."""
    outcome: RunOutcome | None = None
    """None: it is under way, or the batch script was killed before it could write the outcome."""


@dataclass(frozen=True)
class History:
    jobs: frozenset[str] = frozenset()
    """Every job of the run that came to its start."""
    attempts: tuple[Attempt, ...] = ()
    """Of all jobs, the oldest first."""
    before_submission: int = 0
    """So many of the attempts belong to jobs before the last one."""
    stopped: str | None = None
    """Why no job starts the run again before a person submits it; None: it was not stopped."""
    not_requeued: str | None = None
    """Why the last job was not started again, though it had to be; None: it was, or did not have to be."""
    unreadable: int = 0
    """Lines without meaning: cut off by a kill while they were written, or edited."""

    @classmethod
    def read(cls, path: Path) -> History:
        """What append() wrote there; empty if there is no such file."""
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return cls()
        return cls.of(text.splitlines())

    @classmethod
    def of(cls, lines: Iterable[str]) -> History:
        """A line is written before what it tells is done, so one that was cut off tells of nothing done."""
        history = cls()
        for line in lines:
            try:
                history = history._with(json.loads(line))
            except (ValueError, KeyError, TypeError):
                history = replace(history, unreadable=history.unreadable + 1)
        return history

    def _with(self, record: dict[str, Any]) -> History:
        event = record["event"]
        if event == "submitted":
            jobs = self.jobs | {str(record["job"])}
            return replace(self, jobs=jobs, before_submission=len(self.attempts), stopped=None)
        if event == "begun":
            attempt = Attempt(
                int(record["attempt"]), str(record["job"]), str(record["nodes"]), record["checkpoint"]
            )
            return replace(self, attempts=(*self.attempts, attempt), stopped=None, not_requeued=None)
        if event == "ended":
            outcome = RunOutcome(Status(record["status"]), record["reason"], record["error"])
            attempts = tuple(
                replace(each, outcome=outcome) if each.number == record["attempt"] else each
                for each in self.attempts
            )
            return replace(self, attempts=attempts)
        if event == "stopped":
            return replace(self, stopped=str(record["reason"]))
        if event == "not_requeued":
            return replace(self, not_requeued=str(record["reason"]))
        raise ValueError(event)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def since_submission(self) -> tuple[Attempt, ...]:
        return self.attempts[self.before_submission :]

    def crashes_at(self, checkpoint: str | None) -> list[Attempt]:
        """Attempts since the submission that began at this checkpoint and failed."""
        return [
            attempt
            for attempt in self.since_submission
            if attempt.checkpoint == checkpoint
            and attempt.outcome is not None
            and attempt.outcome.status is Status.FAILED
        ]


def append(path: Path, event: str, **values: object) -> None:
    """Add one line, which is on the disk when this returns."""
    record = {"event": event, **values, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # after a line that was cut off: this one must not become part of it
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
