"""A release is believed only when the device has the memory: pure, since a CPU frees nothing."""

from __future__ import annotations

import itertools

import pytest

from megatron_pmd.device import DeviceMemory
from megatron_pmd.engine.device_memory import wait_freed
from megatron_pmd.errors import EngineError
from megatron_pmd.waiting import Waits

GB = 10**9
BEFORE = DeviceMemory(free=5 * GB, actor=15 * GB, total=80 * GB)


class Device:
    """Frees 10 GB at every look, up to a limit; its clock advances by what is slept."""

    def __init__(self, most: int) -> None:
        self.looks, self.most, self.seconds = itertools.count(1), most, 0.0

    def measure(self) -> DeviceMemory:
        return DeviceMemory(BEFORE.free + min(next(self.looks) * 10 * GB, self.most), BEFORE.actor, 80 * GB)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def wait(self, promised: int) -> DeviceMemory:
        return wait_freed(
            self.measure, BEFORE, promised, what="engine 3, kv_cache", deadline_seconds=2.0,
            clock=lambda: self.seconds, sleep=self.sleep,
        )  # fmt: skip


def test_memory_that_comes_late_is_waited_for():
    device = Device(most=60 * GB)
    assert device.wait(40 * GB).free == 45 * GB
    assert 0 < device.seconds < 2.0


def test_a_promise_counts_as_kept_but_for_five_percent():
    assert Device(most=39 * GB).wait(40 * GB).free == 44 * GB


def test_memory_that_does_not_come_is_an_error_with_both_sides():
    device = Device(most=30 * GB)
    with pytest.raises(EngineError) as error:
        device.wait(40 * GB)
    assert str(error.value) == (
        "engine 3, kv_cache: 30.00 of 40.00 GB were freed 2 s after the release. The device has 80.00 GB: "
        "the actor holds 15.00, the engine and what else runs there 30.00 (60.00 before), 35.00 are free"
    )
    assert device.seconds == pytest.approx(2.0, abs=0.06)


def test_a_release_that_frees_nothing_is_an_error_even_if_nothing_is_known_of_its_size():
    with pytest.raises(EngineError, match=r"0\.00 of 0\.00 GB"):
        Device(most=0).wait(1)


def test_a_long_wait_says_what_for_and_that_another_process_may_be_the_reason(monkeypatch):
    said: list[str] = []
    device = Device(most=30 * GB)
    waits = Waits(lambda: device.seconds, said.append, watched=False)
    monkeypatch.setattr("megatron_pmd.engine.device_memory.waiting_for", waits.waiting_for)

    def sleep_and_look(seconds: float) -> None:
        device.sleep(seconds)
        waits.tell()

    with pytest.raises(EngineError):
        wait_freed(
            device.measure, BEFORE, 40 * GB, what="engine 3, kv_cache", deadline_seconds=12.0,
            clock=lambda: device.seconds, sleep=sleep_and_look,
        )  # fmt: skip
    [words] = said
    assert words.startswith("waiting for 40.00 GB that engine 3, kv_cache has released to be free")
    assert words.endswith("at most 12 s; is another process on the device?")
