"""A rank that stands still, stopped by the system or silent, is ended and named on its own node."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from setproctitle import setproctitle

from megatron_pmd.heartbeat import Heartbeat
from megatron_pmd.node import watch
from megatron_pmd.node.worker import PROCESS_TITLE, TELL_WHERE, JobSpec
from megatron_pmd.outcome import RunOutcome, Status

LOOKS = 5


def wait_as(title: str, file: Path) -> None:
    """A rank with a helper, whose process id is in the file once both are there."""
    setproctitle(title)
    helper = subprocess.Popen(["sleep", "120"])
    file.with_suffix(".partial").write_text(str(helper.pid))
    file.with_suffix(".partial").rename(file)
    helper.wait()


class Ranks:
    """Ranks 2 and 3, children of this process, and their helpers."""

    def __init__(self, folder: Path) -> None:
        self.processes: list[BaseProcess] = []
        self.helpers: list[int] = []
        for number in (2, 3):
            file = folder / f"helper-{number}"
            process = multiprocessing.get_context("fork").Process(
                target=wait_as, args=(f"{PROCESS_TITLE} {number}", file)
            )
            process.start()
            self.processes.append(process)
            while not file.exists():
                time.sleep(0.01)
            self.helpers.append(int(file.read_text()))

    def end(self) -> None:
        for helper in self.helpers:
            os.kill(helper, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(watch, "LOOKS", LOOKS)
    monkeypatch.setattr(watch, "LOOKS_APART_SECONDS", 0.05)
    started = Ranks(tmp_path)
    yield started
    started.end()


def test_a_stopped_rank_is_ended_and_named_and_no_other(ranks: Ranks, spec: JobSpec) -> None:
    with watch.ending_ranks_that_stand_still(spec, first_rank=2):
        os.kill(ranks.processes[1].pid or 0, signal.SIGSTOP)
        ranks.processes[1].join(30)
        assert ranks.processes[1].exitcode == -signal.SIGKILL
    outcome = RunOutcome.read(spec.outcome_file(1))
    assert outcome is not None and outcome.status is Status.FAILED
    assert outcome.reason.startswith(f"it (number {ranks.processes[1].pid}, {PROCESS_TITLE} 3) was stopped")
    assert outcome.reason.endswith("rank 3 was ended")
    assert ranks.processes[0].is_alive() and not spec.outcome_file(0).exists()


def test_a_rank_whose_helper_is_stopped_is_ended_and_the_helper_named(ranks: Ranks, spec: JobSpec) -> None:
    with watch.ending_ranks_that_stand_still(spec, first_rank=2):
        os.kill(ranks.helpers[0], signal.SIGSTOP)
        ranks.processes[0].join(30)
        assert ranks.processes[0].exitcode == -signal.SIGKILL
    outcome = RunOutcome.read(spec.outcome_file(0))
    assert outcome is not None
    assert outcome.reason.startswith(
        f"a process that it started (number {ranks.helpers[0]}, sleep 120) was stopped"
    )


def test_a_rank_that_goes_on_in_time_is_left_alone_however_often_it_stops(
    ranks: Ranks, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    stopped = watch._stopped

    def look(*those: Any) -> list[Any]:
        found = list(stopped(*those))
        looks.append(len(found))
        turn = len(looks) % LOOKS  # stopped in all looks but one of LOOKS
        os.kill(ranks.processes[0].pid or 0, signal.SIGCONT if turn == 0 else signal.SIGSTOP)
        return found

    monkeypatch.setattr(watch, "_stopped", look)
    with watch.ending_ranks_that_stand_still(spec, first_rank=2):
        while len(looks) < 4 * LOOKS:
            time.sleep(0.01)
    assert sum(looks) > 2 * LOOKS, "it was seen stopped, more often than a stop that ends it takes"
    assert ranks.processes[0].is_alive() and not spec.outcome_file(0).exists()


def get_stuck(spec: JobSpec, where: str) -> None:
    """A rank 2 that announces half a second, and then waits for itself or for a rank that does not come."""
    faulthandler.register(TELL_WHERE, os.open(spec.stacks[0], os.O_WRONLY | os.O_APPEND))
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    setproctitle(f"{PROCESS_TITLE} 2")
    heartbeat = Heartbeat(Path(spec.heartbeats[0]))
    heartbeat.enter("anchor", 3, patience_seconds=0.5)
    if where == "others":
        with heartbeat.waiting():
            time.sleep(120)
    elif where == "collective":
        dist.init_process_group("gloo", init_method=f"file://{spec.outcomes}", rank=0, world_size=2)
    else:
        wait_for_a_file_system()


def wait_for_a_file_system() -> None:
    time.sleep(120)


@pytest.fixture
def stuck(spec: JobSpec, monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[BaseProcess]:
    monkeypatch.setattr(watch, "LOOKS_APART_SECONDS", 0.05)
    (Path(spec.folder) / "logs").mkdir()
    process = multiprocessing.get_context("fork").Process(target=get_stuck, args=(spec, where))
    process.start()
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("where", ["itself"])
def test_a_silent_rank_is_ended_and_the_function_named_in_which_it_stood(
    stuck: BaseProcess, spec: JobSpec
) -> None:
    with watch.ending_ranks_that_stand_still(spec, first_rank=2):
        stuck.join(30)
    assert stuck.exitcode == -signal.SIGKILL
    outcome = RunOutcome.read(spec.outcome_file(0))
    assert outcome is not None and outcome.status is Status.FAILED
    assert outcome.reason.startswith("it gave no sign of life for 0 s in anchor of iteration 3; it stood at ")
    assert f"{__file__}:" in outcome.reason
    assert " in wait_for_a_file_system; rank 2 was ended" in outcome.reason
    threads = (Path(spec.folder) / "logs/where-rank-2-stood.txt").read_text()
    assert "wait_for_a_file_system" in threads and "threading.py" in threads


@pytest.mark.parametrize("where", ["others", "collective"])
def test_a_rank_that_waits_for_others_is_left_alone(
    stuck: BaseProcess, spec: JobSpec, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In a collective of Control it says so itself; in one of Megatron its stack does."""
    asked, ask = list[str](), watch._where_it_stands

    def look(rank: psutil.Process, file: Path) -> str:
        asked.append(ask(rank, file))
        return asked[-1]

    monkeypatch.setattr(watch, "_where_it_stands", look)
    with watch.ending_ranks_that_stand_still(spec, first_rank=2):
        stuck.join(3)
    assert stuck.is_alive() and not spec.outcome_file(0).exists()
    assert bool(asked) == (where == "collective")
    assert all("distributed_c10d.py" in stacks for stacks in asked)
