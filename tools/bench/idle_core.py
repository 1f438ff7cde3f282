"""An event loop with the time that a core of its own would show, on a machine that is busy."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 0.05
"""Between two looks at whether an answer that costs no time is there."""


class IdleCoreLoop(asyncio.SelectorEventLoop):
    """Its time is the processor time of its thread, and what it would have slept.

    Sleeping is skipped: a run takes as long as its computations. Nothing here is measured of what the machine
    does beside it, but for its caches. It is asyncio's own loop: uvloop, which a run has, cannot be told the
    time.
    """

    def __init__(self, answers_are_due: Callable[[], bool]) -> None:
        """answers_are_due: whether another process is to answer, whose own time does not count."""
        self._slept = 0.0
        super().__init__(_Selector(self._sleep, answers_are_due))

    def time(self) -> float:
        return time.thread_time() + self._slept

    def _sleep(self, seconds: float) -> None:
        self._slept += seconds


class _Selector(selectors.EpollSelector):
    def __init__(self, sleep: Callable[[float], None], answers_are_due: Callable[[], bool]) -> None:
        super().__init__()
        self._sleep, self._answers_are_due = sleep, answers_are_due

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._answers_are_due():
            return super().select(WAIT_SECONDS)
        self._sleep(timeout)
        return []
