"""What a run tells: console and journal on the driver; on the other ranks the same calls do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron_pmd.files import JsonObject
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.journal import Journal, Kind, Phase
from megatron_pmd.outcome import RunOutcome

T = TypeVar("T")


class RunLog:
    def __init__(self, console: Console, journal: Journal | None) -> None:
        """journal: None on every rank but the driver."""
        self.console = console
        self._journal = journal

    def begin_iteration(self, t: int) -> None:
        """What is logged from here on belongs to iteration t; after the last, t = iterations."""
        if self._journal:
            self._journal.iteration(t)

    def log(self, kind: Kind, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._journal:
            self._journal.log(kind, values)

    def say(self, message: str) -> None:
        if self._journal:
            self.console.say(message)

    def iterations_before(self, t: int) -> list[JsonObject]:
        """The `iteration` lines of the iterations before t, oldest first; none on other ranks."""
        return self._journal.iterations_before(t) if self._journal else []

    def seconds_by_phase(self, t: int) -> dict[str, float]:
        """How long each phase of iteration t took; empty on other ranks."""
        phases = self._journal.record(t).phases if self._journal else []
        return {phase["phase"]: phase["seconds"] for phase in phases}

    def show_iteration(self, t: int) -> None:
        """The table of an iteration whose line is logged."""
        if self._journal:
            self.console.iteration(self._journal.record(t))

    def progress(self, title: str, items: list[T]) -> Iterable[T]:
        """The items, with a bar on the console."""
        if not self._journal:
            yield from items
            return
        with self.console.progress(title, len(items)) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase and enter it into the ledger; elsewhere the phase takes 0 seconds."""
        if not self._journal:
            yield Phase(name)
            return
        with self._journal.phase(name) as phase:
            yield phase

    def finish(self, outcome: RunOutcome) -> None:
        """Write summary.json and close the run's files."""
        if self._journal:
            self._journal.finish(outcome)
