"""Sub-phases: what a phase of the ledger is made of, measured on every rank and brought together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Part:
    """One sub-phase on one rank."""

    name: str
    seconds: float = 0.0
    bytes: int | None = None
    """Moved in it."""
    actor_bytes: int | None = None
    """Resident memory of this rank at its end."""
    engine_bytes: int | None = None
    """Resident memory of this rank's engine at its end."""


class Parts:
    """A rank's clock for sub-phases: `with parts("kv_cache"): …`; the same name again adds to that part."""

    def __init__(self, memory: Callable[[], tuple[int, int]] | None = None) -> None:
        """memory: resident bytes of (this rank, its engine) now; None: not measured."""
        self._memory = memory
        self._parts: dict[str, Part] = {}

    @contextmanager
    def __call__(self, name: str, nbytes: int | None = None, *, memory: bool = True) -> Iterator[None]:
        """memory: look at it at the end; not inside a loop whose rounds take milliseconds."""
        part = self._parts.setdefault(name, Part(name))
        begun = time.perf_counter()
        try:
            yield
        finally:
            part.seconds += time.perf_counter() - begun
            if nbytes is not None:
                part.bytes = (part.bytes or 0) + nbytes
            if memory and self._memory is not None:
                part.actor_bytes, part.engine_bytes = self._memory()

    def take(self) -> list[Part]:
        """The parts since the last take, in the order in which they began."""
        taken, self._parts = list(self._parts.values()), {}
        return taken


def together(by_rank: list[list[Part]]) -> list[dict[str, Any]]:
    """Lines for the ledger: the seconds of the slowest rank, its bytes, and all ranks' memory.

    Ranks whose engine is led by another, or that have none, know fewer parts.
    """
    merged: dict[str, list[Part]] = {}
    for parts in by_rank:
        for part in parts:
            merged.setdefault(part.name, []).append(part)
    lines = []
    for name, parts in merged.items():
        slowest = max(parts, key=lambda part: part.seconds)
        moved = max((part.bytes for part in parts if part.bytes is not None), default=None)
        lines.append(
            {
                "part": name,
                "seconds": round(slowest.seconds, 6),
                "bytes": moved,
                "gigabytes_per_second": None if moved is None else moved / max(slowest.seconds, 1e-9) / 1e9,
                "actor_bytes": _sum(part.actor_bytes for part in parts),
                "engine_bytes": _sum(part.engine_bytes for part in parts),
            }
        )
    return lines


def _sum(values: Iterator[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
