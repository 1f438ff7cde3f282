"""Memory between engines and actors: what an engine is asked for, and what becomes of one that refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pmd.device import SharedDevice
from megatron_pmd.engine.device_memory import EngineMemory
from megatron_pmd.engine.handover import Handover, Pauses
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock


class Calls:
    """The control endpoints of an engine that dies, as SGLang's, of being asked for what it has done."""

    spec = SimpleNamespace(number=0, cpu=True)

    def __init__(self) -> None:
        self.resident = {"kv_cache", "weights"}
        self.asked: list[tuple[str, ...]] = []

    def release(self, kinds):
        self.asked.append(("release", *kinds))
        assert self.resident.issuperset(kinds), "the engine dies"
        self.resident -= set(kinds)

    def resume(self, kinds):
        self.asked.append(("resume", *kinds))
        assert self.resident.isdisjoint(kinds), "the engine dies"
        self.resident |= set(kinds)


def test_each_kind_is_handed_over_by_a_call_of_its_own_and_never_twice():
    clock = SubphaseClock()
    calls: Any = Calls()
    memory = EngineMemory(clock, deadline_seconds=1.0)
    memory.begin()
    memory.resume(calls, ["weights"])
    memory.release(calls, ["kv_cache", "weights"])
    memory.release(calls, ["kv_cache", "weights"])
    memory.resume(calls, ["weights"])
    memory.release(calls, ["kv_cache", "weights"])
    assert calls.asked == [
        ("release", "kv_cache"), ("release", "weights"), ("resume", "weights"), ("release", "weights")
    ]  # fmt: skip
    assert [subphase.name for subphase in clock.take()] == ["kv_cache", "weights"]


def test_a_call_that_fails_leaves_the_account_as_it_was():
    calls: Any = Calls()
    memory = EngineMemory(SubphaseClock(), deadline_seconds=1.0)
    memory.begin()
    release, calls.release = calls.release, failing
    with pytest.raises(EngineError, match="no answer"):
        memory.release(calls, ["kv_cache"])
    calls.release = release
    memory.release(calls, ["kv_cache"])
    assert calls.resident == {"weights"}


def failing(*_):
    raise EngineError("no answer")


class Fleet:
    """One engine, which this rank leads; it gives no memory, and is lost or not."""

    elsewhere = False

    def __init__(self, lost: str | None):
        self.killed: list[int] = []
        self.own = SimpleNamespace(number=3, release=failing, why_lost=lambda probe: lost)

    def on_leaders(self, action):
        return [action(self.own)]

    def kill(self, engines):
        self.killed += engines


def test_a_lost_engine_that_does_not_release_its_memory_is_killed_and_that_frees_it():
    fleet, device = Fleet(lost="it died"), SharedDevice()
    Handover(fleet, SubphaseClock(), device).release()  # type: ignore[arg-type]
    assert fleet.killed == [3] and device.held == set()


@pytest.mark.parametrize("step", ["resume_cache", "go_on"])
def test_an_engine_that_dies_after_its_update_is_killed_and_the_others_go_on(step):
    fleet: Any = Fleet(lost="it died")
    fleet.own.calls = SimpleNamespace(flush_cache=lambda paused: failing(), go_on=failing)
    getattr(Pauses(fleet, SubphaseClock(), "retract"), step)()
    assert fleet.killed == [3]
    fleet.own.why_lost = lambda probe: None
    with pytest.raises(EngineError, match="no answer"):
        getattr(Pauses(fleet, SubphaseClock(), "retract"), step)()


def test_a_living_engine_that_does_not_release_its_memory_is_an_error():
    fleet, device = Fleet(lost=None), SharedDevice()
    with pytest.raises(EngineError, match="no answer"):
        Handover(fleet, SubphaseClock(), device).release()  # type: ignore[arg-type]
    assert fleet.killed == [] and device.held == {"weights", "kv_cache"}


def test_an_engines_cache_does_not_come_beside_the_actors_parameters():
    fleet, device = Fleet(lost="it died"), SharedDevice()
    handover = Handover(fleet, SubphaseClock(), device)  # type: ignore[arg-type]
    handover.release()
    device.take("parameters")
    with pytest.raises(RuntimeError, match="kv_cache would come to a device that parameters has not left"):
        handover.resume_cache()


@pytest.mark.parametrize(("mode", "flushes"), [("retract", [("flush", True)]), ("in_place", [])])
def test_engines_with_devices_of_their_own_are_paused_flushed_and_go_on_and_keep_their_memory(mode, flushes):
    """SGLang refuses a flush while requests keep their cache."""
    asked: list[Any] = []
    calls = SimpleNamespace(
        pause=asked.append,
        flush_cache=lambda *, paused: asked.append(("flush", paused)),
        go_on=lambda: asked.append("go on"),
    )
    own = SimpleNamespace(calls=calls, unwatch=lambda: asked.append("unwatch"))
    fleet: Any = SimpleNamespace(
        elsewhere=False, on_leaders=lambda action: [action(own)], kill=lambda engines: None
    )
    pauses = Pauses(fleet, SubphaseClock(), mode)
    pauses.release()
    pauses.before_restart()
    assert asked == []
    pauses.resume_weights()
    pauses.resume_cache()
    pauses.go_on()
    # a health check would wait for a token that a paused engine does not make
    assert asked == ["unwatch", mode, *flushes, "go on"]
