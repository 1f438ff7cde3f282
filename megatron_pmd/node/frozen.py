"""Ends a rank that the system has stopped: the others would wait for it as long as for a rollout, hours.

A process is stopped by SIGSTOP: of an administrator, of a debugger, of a system that suspends jobs. The other
ranks cannot tell it from one that computes; on its own node the kernel can.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import psutil

from megatron_pmd.node.worker import PROCESS_TITLE, JobSpec
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import beside

TITLE = rf"{PROCESS_TITLE} (\d+)"
LOOKS_APART_SECONDS = 2.0
LOOKS = 30
"""In so many one after the other it was stopped. Of looks, not of seconds: Ctrl-Z stops this process too."""


def ending_frozen_ranks(spec: JobSpec, first_rank: int) -> AbstractContextManager[None]:
    """Within it a rank of this process that is stopped for a minute, or a helper of which is, is killed.

    first_rank: of the ranks that this process starts. What was stopped stands in the rank's outcome file
    before the rank ends, so that it is the reason of the run's end.
    """

    def look(ended: threading.Event) -> None:
        seen: dict[int, int] = {}
        while not ended.wait(LOOKS_APART_SECONDS):
            stopped = list(_stopped())
            seen = {process.pid: seen.get(process.pid, 0) + 1 for process, _, _ in stopped}
            for process, rank, number in stopped:
                if seen[process.pid] == LOOKS:
                    _note(process, rank, number, spec.outcome_file(number - first_rank))
                    with suppress(psutil.NoSuchProcess):
                        rank.kill()

    return beside(look, "frozen-ranks")


def _stopped() -> Iterator[tuple[psutil.Process, psutil.Process, int]]:
    """Each stopped process that is a rank of this process or a child of one; its rank, and that one's number.

    Engines' servers are further down: who started them watches them.
    """
    family = psutil.Process().children(recursive=True)  # one look at all processes of the node
    ranks = {}
    for process in family:
        with suppress(psutil.Error):
            if process.ppid() == os.getpid() and (title := re.match(TITLE, " ".join(process.cmdline()))):
                ranks[process.pid] = process, int(title[1])
    for process in family:
        with suppress(psutil.Error):
            found = ranks.get(process.pid) or ranks.get(process.ppid())
            if found and process.status() == psutil.STATUS_STOPPED:
                yield process, *found


def _note(process: psutil.Process, rank: psutil.Process, number: int, file: Path) -> None:
    """Into a rank's outcome file, in what its run will end with."""
    who = "it" if process == rank else "a process that it started"
    reason = (
        f"{who} (number {process.pid}) was stopped by a signal (SIGSTOP) and did not go on for "
        f"{LOOKS * LOOKS_APART_SECONDS:.0f} s; rank {number} was ended"
    )
    with suppress(OSError):  # no room even in memory: the launcher then tells how the rank ended
        RunOutcome(Status.FAILED, reason).write(file)
