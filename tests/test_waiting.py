"""What a process waits for is told after ten seconds, by a clock that the test turns."""

from __future__ import annotations

import os
import threading
import time

import pytest

from megatron_pmd import waiting
from megatron_pmd.waiting import Waits


class Clock:
    def __init__(self) -> None:
        self.now, self.said = 1000.0, [""][:0]
        self.waits = Waits(lambda: self.now, self.said.append, watched=False)

    def pass_(self, seconds: float) -> list[str]:
        """What is said meanwhile, by a look every second."""
        before = len(self.said)
        for _ in range(round(seconds)):
            self.now += 1
            self.waits.tell()
        return self.said[before:]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_wait_is_told_once_after_ten_seconds_and_again_after_five_minutes(clock: Clock) -> None:
    with clock.waits.waiting_for("the router", 600.0, remark="; log: x"):
        assert clock.pass_(10) == []
        assert clock.pass_(1) == ["waiting for the router, 11 s so far, at most 600 s; log: x"]
        assert clock.pass_(299) == []
        assert clock.pass_(1) == ["waiting for the router, 311 s so far, at most 600 s; log: x"]
    assert clock.pass_(900) == []


def test_short_waits_one_after_another_are_not_told(clock: Clock) -> None:
    for _ in range(20):
        with clock.waits.waiting_for("the router", 600.0):
            assert clock.pass_(9) == []


def test_a_thousand_threads_that_wait_for_one_thing_are_told_of_once(clock: Clock) -> None:
    open_waits = [clock.waits.waiting_for("the reward service") for _ in range(1000)]
    for wait in open_waits:
        wait.__enter__()
    with clock.waits.waiting_for("the disk"):
        said = clock.pass_(30)
    assert said == [f"waiting for the {what}, 11 s so far" for what in ("reward service", "disk")]


def test_two_things_that_begin_alike_are_both_told(clock: Clock) -> None:
    said = []
    for call in ("release", "update"):
        with clock.waits.waiting_for(f"engine 3 (10.0.0.2, port 30007) to answer /{call}"):
            said += clock.pass_(30)
    assert [line.partition(" to answer ")[2] for line in said] == [
        "/release, 11 s so far",
        "/update, 11 s so far",
    ]


def test_what_is_waited_for_may_change_meanwhile(clock: Clock) -> None:
    absent = ["n1", "n2"]
    with clock.waits.waiting_for(lambda: ", ".join(absent)):
        clock.pass_(5)
        absent.pop(0)
        assert clock.pass_(6) == ["waiting for n2, 11 s so far"]


def test_a_thread_looks_while_there_are_waits_and_ends_with_them(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting.waiting_for("a miracle"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "waiting for a miracle, 0 s so far\n"
    for _ in range(200):
        if all(thread.name != "waits" for thread in threading.enumerate()):
            return
        time.sleep(0.02)
    raise AssertionError("the thread is still there")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_does_not_tell_what_its_parent_waits_for(
    impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with waiting.waiting_for("what is the parent's alone"):
        child = os.fork()
        if not child:
            try:
                with waiting.waiting_for("the child's own"):
                    time.sleep(0.3)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    said = capfd.readouterr().err
    assert said.count("the child's own") == 1
    assert said.count("the parent's alone") == 1
