"""A rank that the system has stopped is ended and named, on its own node."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from setproctitle import setproctitle

from megatron_pmd.node import frozen
from megatron_pmd.node.worker import PROCESS_TITLE, JobSpec
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
    monkeypatch.setattr(frozen, "LOOKS", LOOKS)
    monkeypatch.setattr(frozen, "LOOKS_APART_SECONDS", 0.05)
    started = Ranks(tmp_path)
    yield started
    started.end()


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return JobSpec(config={}, folder=str(tmp_path), outcomes=str(tmp_path / "outcome"))


def test_a_stopped_rank_is_ended_and_named_and_no_other(ranks: Ranks, spec: JobSpec) -> None:
    with frozen.ending_frozen_ranks(spec, first_rank=2):
        os.kill(ranks.processes[1].pid or 0, signal.SIGSTOP)
        ranks.processes[1].join(30)
        assert ranks.processes[1].exitcode == -signal.SIGKILL
    outcome = RunOutcome.read(spec.outcome_file(1))
    assert outcome is not None and outcome.status is Status.FAILED
    assert outcome.reason.startswith(f"it (number {ranks.processes[1].pid}) was stopped by a signal")
    assert outcome.reason.endswith("rank 3 was ended")
    assert ranks.processes[0].is_alive() and not spec.outcome_file(0).exists()


def test_a_rank_whose_helper_is_stopped_is_ended_and_the_helper_named(ranks: Ranks, spec: JobSpec) -> None:
    with frozen.ending_frozen_ranks(spec, first_rank=2):
        os.kill(ranks.helpers[0], signal.SIGSTOP)
        ranks.processes[0].join(30)
        assert ranks.processes[0].exitcode == -signal.SIGKILL
    outcome = RunOutcome.read(spec.outcome_file(0))
    assert outcome is not None
    assert outcome.reason.startswith(f"a process that it started (number {ranks.helpers[0]}) was stopped")


def test_a_rank_that_goes_on_in_time_is_left_alone_however_often_it_stops(
    ranks: Ranks, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    stopped = frozen._stopped

    def look() -> list[Any]:
        found = list(stopped())
        looks.append(len(found))
        turn = len(looks) % LOOKS  # stopped in all looks but one of LOOKS
        os.kill(ranks.processes[0].pid or 0, signal.SIGCONT if turn == 0 else signal.SIGSTOP)
        return found

    monkeypatch.setattr(frozen, "_stopped", look)
    with frozen.ending_frozen_ranks(spec, first_rank=2):
        while len(looks) < 4 * LOOKS:
            time.sleep(0.01)
    assert sum(looks) > 2 * LOOKS, "it was seen stopped, more often than a stop that ends it takes"
    assert ranks.processes[0].is_alive() and not spec.outcome_file(0).exists()
