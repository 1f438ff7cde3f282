"""When a run has to end before it is complete: it is told to save, or its allocation is about to end."""

from __future__ import annotations

import os
import signal
import threading
import time

from megatron_pmd.processes import SAVE, hold_back

CUTTABLE = {"evaluate", "rollout"}
"""Phases that can be ended at any moment; the others run to their end once begun."""
CHECKED = CUTTABLE | {"anchor", "update", "sync"}
"""Phases before which a run looks whether it must end. Each of the others follows one of these at once."""

LEAST_SAVE_SECONDS = 60.0
"""Until one has been seen whole: most of a checkpoint is written beside other phases."""
MARGIN_SECONDS = 30.0
"""For what no phase counts: engines that stop, processes that end, a coarse clock."""


class Shutdown:
    """What one rank knows of the run's end.

    The signal is only noted: a rank that is in the middle of a collective cannot stop. Every rank is asked
    before each phase, and all of them end together when one must.
    """

    def __init__(self, end_time: float | None = None) -> None:
        """end_time: when the allocation ends, in seconds since the epoch; None: never."""
        self._end_time, self._asked = end_time, threading.Event()
        self._longest: dict[str, float] = {}

    @classmethod
    def of_this_job(cls) -> Shutdown:
        """With the end that the batch script read from Slurm; it counts from the allocation's start."""
        return cls(float(os.environ.get("PMD_END_TIME") or 0) or None)

    def install(self) -> None:
        """Note SIGUSR1, also one that came since this rank was started: its parent holds it back for it."""
        hold_back(SAVE)
        threading.Thread(target=self._listen, name="signal-to-save", daemon=True).start()

    def _listen(self) -> None:
        signal.sigwait({SAVE})
        self._asked.set()

    def expect(self, phase: str, seconds: float) -> None:
        """Note how long a phase took, in this start or an earlier one."""
        self._longest[phase] = max(seconds, self._longest.get(phase, 0.0))

    def reason_before(self, phase: str) -> str | None:
        """Why the phase must not begin; None if it may."""
        if self._asked.is_set():
            return "was told to save (SIGUSR1)"
        seconds = self._seconds_after(phase)
        if seconds < 0:
            return f"{phase} and a checkpoint would end {-seconds:.0f} s after the allocation"
        return None

    def must_cut(self) -> bool:
        """Whether a phase that can be ended at any moment must end now."""
        return self._asked.is_set() or self._seconds_after("") < 0

    def _seconds_after(self, phase: str) -> float:
        """Of the allocation, when the phase, a checkpoint and the margin are over."""
        if self._end_time is None:
            return float("inf")
        # a phase that can be cut needs no time of its own
        run = 0.0 if phase in CUTTABLE else self._longest.get(phase, 0.0)
        save = max(self._longest.get("save", 0.0), LEAST_SAVE_SECONDS)
        return self._end_time - time.time() - run - save - MARGIN_SECONDS
