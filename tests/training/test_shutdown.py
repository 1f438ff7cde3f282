"""When a run must end: by a signal, or by the clock of its allocation."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron_pmd.training.shutdown import LEAST_SAVE_SECONDS, MARGIN_SECONDS, Shutdown


@pytest.fixture
def shutdown(monkeypatch: pytest.MonkeyPatch) -> Shutdown:
    """Of an allocation that ends at 10,000 s; the clock stands at 9,000."""
    monkeypatch.setattr(time, "time", lambda: 9_000.0)
    return Shutdown(end_time=10_000.0)


def test_without_an_end_or_a_signal_everything_may_begin() -> None:
    assert Shutdown().reason_before("update") is None
    assert not Shutdown().must_cut()


def test_a_phase_that_would_leave_no_time_for_a_checkpoint_may_not_begin(shutdown: Shutdown) -> None:
    """1,000 s are left: 700 s of update, 200 s of saving and the margin fit; 800 s do not."""
    shutdown.expect("save", 200.0)
    shutdown.expect("update", 700.0)
    assert shutdown.reason_before("update") is None
    shutdown.expect("update", 800.0)
    assert shutdown.reason_before("update") == "update and a checkpoint would end 30 s after the allocation"


def test_the_longest_phase_seen_counts_not_the_last(shutdown: Shutdown) -> None:
    for seconds in (950.0, 10.0):
        shutdown.expect("update", seconds)
    assert shutdown.reason_before("update") is not None


def test_a_rollout_may_begin_as_long_as_it_could_be_cut_in_time(
    shutdown: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown.expect("rollout", 5_000.0)
    assert shutdown.reason_before("rollout") is None
    monkeypatch.setattr(time, "time", lambda: 10_000.0 - LEAST_SAVE_SECONDS - MARGIN_SECONDS + 1)
    assert shutdown.reason_before("rollout") is not None
    assert shutdown.must_cut()


NOTED = """
import os, signal, subprocess, sys, time
from megatron_pmd.processes import SAVE, hold_back
from megatron_pmd.training.shutdown import Shutdown
hold_back(SAVE)
early = sys.argv[1] == "before"
if early:
    os.kill(os.getpid(), signal.SIGUSR1)
shutdown = Shutdown()
shutdown.install()
if not early:
    os.kill(os.getpid(), signal.SIGUSR1)
while shutdown.reason_before("rollout") is None:
    time.sleep(0.001)
assert shutdown.must_cut()
subprocess.run(["sh", "-c", "kill -USR1 $$"], check=True)
print(shutdown.reason_before("rollout"))
"""
"""A rank is started by a process that holds the signal back; here it is the same process."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_signal_is_noted_also_before_a_rank_listens_and_ends_nothing_that_it_started(when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTED, when], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "was told to save (SIGUSR1)\n"), done.stderr


@pytest.mark.parametrize(("value", "limited"), [("", False), ("0", False), ("1", True)])
def test_the_allocations_end_comes_from_the_batch_script(
    value: str, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMD_END_TIME", value)
    assert Shutdown.of_this_job().must_cut() is limited
