"""Ends a rank that does not get on: the others would wait for it as long as for a rollout, hours.

The system has stopped it (SIGSTOP, of an administrator, a debugger, a scheduler that suspends jobs), or it
gives no sign of life, in a file system that hangs for example. The other ranks cannot tell either from a rank
that computes. Its launcher, on the same node, can.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import psutil

from megatron_pmd.heartbeat import Beat
from megatron_pmd.node.worker import PROCESS_TITLE, TELL_WHERE, JobSpec
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import beside

TITLE = rf"{PROCESS_TITLE} (\d+)"
LOOKS_APART_SECONDS = 2.0
LOOKS = 30
"""In so many one after the other it was stopped. Of looks, not of seconds: Ctrl-Z stops this process too."""
COMMAND_CHARACTERS = 60
"""Of a process's command line, in a message."""
TELLING_SECONDS = 5.0
"""For a rank to write where its threads stand."""
COLLECTIVE = f"{os.sep}torch{os.sep}distributed{os.sep}"
"""In the file of the innermost Python function of a thread that waits for other ranks."""
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')


def ending_ranks_that_stand_still(spec: JobSpec, first_rank: int) -> AbstractContextManager[None]:
    """Within it a rank of this process is killed that is stopped for a minute, or a helper of which is.

    So is one that is silent for longer than it announced (heartbeat.py), unless it waits for other ranks.
    first_rank: of the ranks that this process starts. Why stands in the rank's outcome file before the rank
    ends, so that it is the reason of the run's end.
    """

    def look(ended: threading.Event) -> None:
        stopped, silences = dict[int, int](), dict[int, _Silence]()
        while not ended.wait(LOOKS_APART_SECONDS):
            family = psutil.Process().children(recursive=True)  # one look at all processes of the node
            ranks = _ranks(family)
            found = list(_stopped(family, ranks))
            stopped = {process.pid: stopped.get(process.pid, 0) + 1 for process, _, _ in found}
            for process, rank, number in found:
                if stopped[process.pid] == LOOKS:
                    _end(rank, spec.outcome_file(number - first_rank), _why_stopped(process, rank, number))
            for rank, number in ranks.values():
                silence = silences.setdefault(rank.pid, _Silence(rank, number, spec, number - first_rank))
                silence.end_rank_if_too_long()

    return beside(look, "ranks-that-stand-still")


def _ranks(family: list[psutil.Process]) -> dict[int, tuple[psutil.Process, int]]:
    """By process number, each rank that this process has started, and its number in the run."""
    ranks = {}
    for process in family:
        with suppress(psutil.Error):
            if process.ppid() == os.getpid() and (title := re.match(TITLE, " ".join(process.cmdline()))):
                ranks[process.pid] = process, int(title[1])
    return ranks


def _stopped(
    family: list[psutil.Process], ranks: dict[int, tuple[psutil.Process, int]]
) -> Iterator[tuple[psutil.Process, psutil.Process, int]]:
    """Each stopped process that is a rank or a child of one; its rank, and that one's number.

    Engines' servers are further down: who started them watches them.
    """
    for process in family:
        with suppress(psutil.Error):
            found = ranks.get(process.pid) or ranks.get(process.ppid())
            if found and process.status() == psutil.STATUS_STOPPED:
                yield process, *found


def _why_stopped(process: psutil.Process, rank: psutil.Process, number: int) -> str:
    who = "it" if process == rank else "a process that it started"
    command = " ".join(process.cmdline())[:COMMAND_CHARACTERS].strip()
    return (
        f"{who} (number {process.pid}, {command}) was stopped by a signal (SIGSTOP) and did not go on for "
        f"{LOOKS * LOOKS_APART_SECONDS:.0f} s; rank {number} was ended"
    )


class _Silence:
    """How long one rank has given no sign of life."""

    def __init__(self, rank: psutil.Process, number: int, spec: JobSpec, local_rank: int) -> None:
        self._rank, self._number, self._spec, self._local_rank = rank, number, spec, local_rank
        self._last: Beat | None = None
        self._looks = 0

    def end_rank_if_too_long(self) -> None:
        """Look once more; end a rank whose patience is over, but not where it waits in a collective.

        Collectives have deadlines, and end on all ranks that wait in them. The rank that does not come is
        ended here.
        """
        beat = Beat.read(Path(self._spec.heartbeats[self._local_rank]))
        same = beat is not None and beat == self._last and not beat.waits
        self._last, self._looks = beat, self._looks + 1 if same else 0
        if beat is None or self._looks * LOOKS_APART_SECONDS <= beat.patience_seconds:
            return
        stacks = _where_it_stands(self._rank, Path(self._spec.stacks[self._local_rank]))
        threads = _threads(stacks)
        self._looks = 0
        stood = threads[0][0] if threads and threads[0] else "a place unknown"
        if any(COLLECTIVE in thread[0] for thread in threads if thread):
            return
        file = Path(self._spec.folder) / "logs" / f"where-rank-{self._number}-stood.txt"
        _end(
            self._rank,
            self._spec.outcome_file(self._local_rank),
            f"it gave no sign of life for {beat.patience_seconds:.0f} s in {beat.phase} of iteration "
            f"{beat.iteration}; it stood at {stood}; rank {self._number} was ended; all its threads: {file}",
        )
        with suppress(OSError):
            file.write_text(stacks)  # after the end: this file system may be what it waited for


def _where_it_stands(rank: psutil.Process, file: Path) -> str:
    """The Python functions that each of its threads is in, as Python's faulthandler writes them.

    Also while the rank computes outside of Python; empty for one that the kernel does not let run.
    """
    file.write_bytes(b"")
    with suppress(psutil.Error):
        rank.send_signal(TELL_WHERE)
    end, told = time.monotonic() + TELLING_SECONDS, ""
    while time.monotonic() < end:
        time.sleep(0.1)
        before, told = told, file.read_text(errors="replace")
        if told and told == before:
            break
    return told


def _threads(stacks: str) -> list[list[str]]:
    """Of each thread, the main one first, its functions, innermost first."""
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        if frame := FRAME.match(line):
            threads[-1].append(f"{frame['file']}:{frame['line']} in {frame['function']}")
        elif line.endswith("(most recent call first):"):
            threads.append([])
    return threads[::-1]  # the main thread, which began first, is told last


def _end(rank: psutil.Process, file: Path, reason: str) -> None:
    with suppress(OSError):  # no room even in memory: the launcher then tells how the rank ended
        RunOutcome(Status.FAILED, reason).write(file)
    with suppress(psutil.NoSuchProcess):
        rank.kill()
