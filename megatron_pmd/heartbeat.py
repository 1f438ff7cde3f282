"""What a rank does, where its launcher can see it: whether it gets on, waits for others, or stands still."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_BYTES = 256


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    phase: str
    iteration: int
    waits: bool
    """For the other ranks, in a collective of Control: it does not stand still by itself."""
    at: float
    """time.monotonic(), which is one clock for all processes of a machine."""
    patience_seconds: float
    """How long it may be silent where it does not wait."""

    @classmethod
    def read(cls, file: Path) -> Beat | None:
        """None if the rank has not begun, or is just writing."""
        try:
            return cls(**json.loads(file.read_bytes()))
        except (FileNotFoundError, ValueError):
            return None


class Heartbeat:
    """One rank's, of its main thread: every phase, micro-batch and collective of Control is a beat."""

    def __init__(self, file: Path | None = None) -> None:
        """file: JobSpec.heartbeats has it; None: nobody looks, as in tools and tests."""
        self._file = os.open(file, os.O_WRONLY) if file else None
        self._phase, self._iteration, self._patience = "start", 0, 0.0

    def enter(self, phase: str, iteration: int, *, patience_seconds: float) -> None:
        """A phase begins, in which nothing may take longer than so much between two beats."""
        self._phase, self._iteration, self._patience = phase, iteration, patience_seconds
        self.beat()

    def beat(self) -> None:
        self._write(waits=False)

    @property
    def place(self) -> str:
        """The phase that this rank is in."""
        return f"{self._phase} of iteration {self._iteration}"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it this rank waits for others."""
        self._write(waits=True)
        try:
            yield
        finally:
            self.beat()

    def _write(self, *, waits: bool) -> None:
        if self._file is None:
            return
        beat = Beat(self._phase, self._iteration, waits, time.monotonic(), self._patience)
        os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(RECORD_BYTES), 0)
