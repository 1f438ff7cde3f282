"""When a run must end: by a signal, or by the clock of its allocation."""

from __future__ import annotations

import os
import signal
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


def test_the_signal_is_noted_and_ends_nothing_by_itself() -> None:
    shutdown, before = Shutdown(), signal.getsignal(signal.SIGUSR1)
    try:
        shutdown.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert shutdown.reason_before("rollout") == "was told to save (SIGUSR1)"
        assert shutdown.must_cut()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("value", "limited"), [("", False), ("0", False), ("1", True)])
def test_the_allocations_end_comes_from_the_batch_script(
    value: str, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMD_END_TIME", value)
    assert Shutdown.of_this_job().must_cut() is limited
