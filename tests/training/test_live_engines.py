"""What is on the device when an engine that the test lets die starts again, and what is told of a rollout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pmd.config import override
from megatron_pmd.device import SharedDevice
from megatron_pmd.engine.handover import Handover
from megatron_pmd.engine.recovery import Recovery
from megatron_pmd.errors import EngineError, EnginesLost
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.training.live_engines import LiveEngines
from recipes import recipe
from tests.engine.only_rank import OnlyRank
from tests.rollout.test_sampler import problem, rollout_for


class Engine:
    """The fleet of one engine, and that engine."""

    elsewhere, leads, number, urls, serves = False, True, 0, ("http://engine",), (0,)
    left_out: frozenset[int] = frozenset()
    calls = SimpleNamespace(flush_cache=lambda: None)

    def __init__(self, device: SharedDevice) -> None:
        self.device, self.dead = device, False
        self.own = self.process = self
        self.beside: list[set[Any]] = []
        """At each start, what the actor held."""

    def on_leaders(self, action):
        return [action(self)]

    def why_lost(self, *, probe: bool):
        return "it died" if self.dead else None

    def start(self, engines) -> None:
        self.dead = False
        self.beside.append(self.device.held & {"parameters", "optimizer"})

    def release(self, *kinds) -> None: ...

    def resume(self, *kinds) -> None: ...

    def kill(self, engines) -> None: ...

    def note_urls(self) -> None: ...

    def wait_ready(self, seconds) -> None: ...


class Actor:
    def __init__(self, device: SharedDevice) -> None:
        self.device = device
        device.take("parameters")

    def release_parameters(self) -> None:
        self.device.leave("parameters")

    def wake_parameters(self) -> None:
        self.device.take("parameters")


@pytest.fixture
def engines() -> Any:
    config, device = recipe("tiny_moe_cpu"), SharedDevice()
    engines: Any = LiveEngines.__new__(LiveEngines)
    engines._config, engines._control, engines._console, engines._shards = config, OnlyRank(), Console(), 1
    engines.fleet = Engine(device)
    engines.handover = Handover(engines.fleet, SubphaseClock(), device)
    engines.recovery = Recovery(engines.fleet, engines.handover, engines._control, config.rollout)
    engines.router = SimpleNamespace(stop=lambda: None)
    engines.handover.release()
    return engines


@pytest.mark.parametrize("when", ["before the sync", "in the sync"])
def test_an_engine_started_again_in_a_sync_finds_the_device_as_at_its_first_start(engines, when):
    """It sizes its KV cache by what is free then: beside the actor's parameters that would be too small."""
    engine, actor = engines.fleet, Actor(engines.fleet.device)
    seen = []

    def push(shards, version, *, serves, before_load):
        before_load()
        seen.append(set(engine.device.held))
        if when == "in the sync" and len(seen) == 1:
            engine.dead = True
            raise EngineError("no answer")
        return "report"

    engines.weight_push = SimpleNamespace(push=push)
    engine.dead = when == "before the sync"
    assert engines.load(actor, 3) == "report"
    assert engine.beside == [set()]
    assert seen[-1] == {"parameters", "weights"}


def test_a_start_beside_the_actors_parameters_is_an_error_of_the_program(engines):
    engines.fleet.dead = True
    Actor(engines.fleet.device)
    with pytest.raises(RuntimeError, match="kv_cache would come to a device that parameters has not left"):
        engines.recovery.restart_lost(probe=False)


def test_what_a_program_failed_of_is_told_and_not_said_of_the_engines(engines, capsys):
    engines._console = Console(width=1000)
    rollout = rollout_for(2, next_problem=lambda: problem(2))
    for member in rollout.groups[0].members:
        rollout.refuse(member, "the agent failed: no sandbox")
    rollout.settled(rollout.groups[0])
    engines._tell_of_refusals(rollout)
    assert capsys.readouterr().out.strip() == (
        "0 requests were refused; 4 responses were dropped in whole groups that could not be begun. "
        "The first reason: the agent failed: no sandbox"
    )


@pytest.mark.parametrize("retries", [0, 2])
def test_a_rollout_that_loses_all_engines_again_and_again_ends_before_they_are_started_in_vain(
    engines, retries
):
    engines._config = override(engines._config, [f"rollout.retries={retries}"])
    done: list[str] = []

    def draw() -> None:
        done.append("drawn")
        raise EnginesLost("no engine answers any more")

    engines.revive = lambda *_, **__: done.append("revived")
    with pytest.raises(EnginesLost):
        engines._with_engines(draw, Actor(engines.fleet.device), 1)
    assert done == ["drawn", *["revived", "drawn"] * retries]
