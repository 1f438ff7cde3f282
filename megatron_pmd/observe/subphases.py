"""Sub-phases: what a phase of the ledger is made of, measured on every rank and brought together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Subphase:
    """One sub-phase on one rank."""

    name: str
    seconds: float = 0.0
    bytes: int | None = None
    """Moved in it."""
    actor_bytes: int | None = None
    """Resident memory of this rank at its end."""
    engine_bytes: int | None = None
    """Resident memory of this rank's engine at its end."""


class SubphaseClock:
    """A rank's clock for sub-phases: `with clock("kv_cache"): …`; the same name again adds to that one."""

    def __init__(self, memory: Callable[[], tuple[int, int]] | None = None) -> None:
        """memory: resident bytes of (this rank, its engine) now; None: not measured."""
        self._memory = memory
        self._subphases: dict[str, Subphase] = {}

    @contextmanager
    def __call__(self, name: str, nbytes: int | None = None, *, memory: bool = True) -> Iterator[None]:
        """memory: look at it at the end; not inside a loop whose rounds take milliseconds."""
        subphase = self._subphases.setdefault(name, Subphase(name))
        begun = time.perf_counter()
        try:
            yield
        finally:
            subphase.seconds += time.perf_counter() - begun
            if nbytes is not None:
                subphase.bytes = (subphase.bytes or 0) + nbytes
            if memory and self._memory is not None:
                subphase.actor_bytes, subphase.engine_bytes = self._memory()

    def take(self) -> list[Subphase]:
        """The sub-phases since the last take, in the order in which they began."""
        taken, self._subphases = list(self._subphases.values()), {}
        return taken


def together(by_rank: list[list[Subphase]]) -> list[dict[str, Any]]:
    """Lines for the ledger: the seconds of the slowest rank, its bytes, and all ranks' memory.

    Ranks whose engine is led by another, or that have none, know fewer.
    """
    merged: dict[str, list[Subphase]] = {}
    for subphases in by_rank:
        for subphase in subphases:
            merged.setdefault(subphase.name, []).append(subphase)
    lines = []
    for name, subphases in merged.items():
        slowest = max(subphases, key=lambda subphase: subphase.seconds)
        moved = max((subphase.bytes for subphase in subphases if subphase.bytes is not None), default=None)
        lines.append(
            {
                "subphase": name,
                "seconds": round(slowest.seconds, 6),
                "bytes": moved,
                "gigabytes_per_second": None if moved is None else moved / max(slowest.seconds, 1e-9) / 1e9,
                "actor_bytes": _sum(subphase.actor_bytes for subphase in subphases),
                "engine_bytes": _sum(subphase.engine_bytes for subphase in subphases),
            }
        )
    return lines


def _sum(values: Iterator[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
