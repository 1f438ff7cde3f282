"""How a start of a run ended: one word, the same on the console, in summary.json, for the shell and Slurm.

Imports nothing that is not in Python's library: the batch script reads it with the node's own interpreter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_pmd.errors import DataError, Interrupted, PmdError
from megatron_pmd.files import read_object, write_whole


class Status(str, Enum):  # noqa: UP042  # enum.StrEnum needs Python 3.11, which a compute node's own may not be
    COMPLETE = "complete"
    """Every iteration is trained."""
    SAVED = "saved"
    """It was told to save, or its time was up: a checkpoint was written, the same command goes on from it."""
    STOPPED = "stopped"
    """The user asked for no more than this (--stop-after)."""
    ALARMED = "alarmed"
    """An alarm whose action is `stop`; a checkpoint was written."""
    INTERRUPTED = "interrupted"
    """Ctrl-C or SIGTERM."""
    REFUSED = "refused"
    """A person has to mend something first: another start would end the same way."""
    FAILED = "failed"
    """Everything else: a crash, a lost node, an engine that does not come back."""


EXIT_CODES = {
    Status.COMPLETE: 0,
    Status.STOPPED: 0,
    Status.FAILED: 1,
    Status.REFUSED: 2,
    Status.ALARMED: 3,
    Status.SAVED: 75,  # EX_TEMPFAIL: nothing failed, and the same command goes on
    Status.INTERRUPTED: 130,
}


@dataclass(frozen=True)
class RunOutcome:
    status: Status
    reason: str = ""
    """What happened, for people."""
    error: str | None = None
    """Name of the error class behind it; None: nothing failed."""

    @classmethod
    def of(cls, failure: BaseException) -> RunOutcome:
        """The one place that turns what ended a run into an outcome."""
        if isinstance(failure, RunEnds):
            return failure.outcome
        name = type(failure).__name__
        if isinstance(failure, (KeyboardInterrupt, Interrupted)):
            return cls(Status.INTERRUPTED, str(failure), name)
        refused = isinstance(failure, PmdError) and failure.refuses
        return cls(Status.REFUSED if refused else Status.FAILED, str(failure) or name, name)

    @classmethod
    def read(cls, path: Path) -> RunOutcome | None:
        """What write() left there; None if there is no such file. Raises DataError for another file."""
        record = read_object(path)
        if record is None:
            return None
        try:
            return cls(Status(record["status"]), record.get("reason") or "", record.get("error"))
        except (KeyError, ValueError):
            raise DataError(f"{path}: not the outcome of a run: {record}") from None

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(self.as_json(), indent=2) + "\n")

    def as_json(self) -> dict[str, str | None]:
        return {"status": self.status.value, "reason": self.reason, "error": self.error}

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    @property
    def may_start_again(self) -> bool:
        """Whether Slurm should start the job again."""
        return self.status in (Status.SAVED, Status.FAILED)

    def __str__(self) -> str:
        """As a person reads it: the word, and why."""
        error = f"{self.error}: " if self.error else ""
        return f"{self.status.value}: {error}{self.reason}" if self.reason else self.status.value


class RunEnds(Exception):
    """Raised on all ranks at once when a run ends before it is complete although nothing failed."""

    def __init__(self, outcome: RunOutcome) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome
