"""Ends a rank that the system has stopped: the others would wait for it as long as for a rollout, hours.

A process is stopped by SIGSTOP: of an administrator, of a debugger, of a system that suspends jobs. The other
ranks cannot tell it from one that computes; on its own node the kernel can.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from megatron_pmd.node.worker import PROCESS_TITLE, JobSpec
from megatron_pmd.outcome import RunOutcome, Status

LOOKS_APART_SECONDS = 1.0
LOOKS = 60
"""In so many one after the other it was stopped. Of looks, not of seconds: Ctrl-Z stops this process too."""


@contextmanager
def ending_frozen_ranks(spec: JobSpec, first_rank: int) -> Iterator[None]:
    """Within it a rank of this process that is stopped for a minute, or a helper of which is, is killed.

    first_rank: of the ranks that this process starts. What was stopped stands in the rank's outcome file
    before the rank ends, so that it is the reason of the run's end.
    """
    ended = threading.Event()

    def look() -> None:
        seen: dict[int, int] = {}
        while not ended.wait(LOOKS_APART_SECONDS):
            stopped = dict(_stopped())
            seen = {pid: seen.get(pid, 0) + 1 for pid in stopped}
            for pid, (rank, what) in stopped.items():
                if seen[pid] == LOOKS:
                    _end(spec, rank, int(_number(rank)) - first_rank, f"{what} (process {pid})")

    thread = threading.Thread(target=look, name="frozen-ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _stopped() -> Iterator[tuple[int, tuple[psutil.Process, str]]]:
    """Of each stopped process its rank's process, and what it is: a rank of this process, or a child of one.

    Engines' servers are further down: who started them watches them.
    """
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if not _number(rank):
                continue
            for process in (rank, *rank.children()):
                if process.status() == psutil.STATUS_STOPPED:
                    name = f"rank {_number(rank)}"
                    yield process.pid, (rank, name if process == rank else f"a helper of {name}")


def _number(process: psutil.Process) -> str:
    """Of a rank, from its title; empty for another process."""
    with suppress(psutil.Error):
        found = re.match(rf"{PROCESS_TITLE} (\d+)", " ".join(process.cmdline()))
        return found[1] if found else ""
    return ""


def _end(spec: JobSpec, rank: psutil.Process, local_rank: int, what: str) -> None:
    seconds = LOOKS * LOOKS_APART_SECONDS
    reason = f"{what} was stopped by a signal (SIGSTOP) and did not go on for {seconds:.0f} s; it was ended"
    with suppress(OSError):
        RunOutcome(Status.FAILED, reason).write(spec.outcome_file(local_rank))
    with suppress(psutil.NoSuchProcess):
        rank.kill()
