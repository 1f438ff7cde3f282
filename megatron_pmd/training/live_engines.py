"""Rollouts from live engines: the fleet, its weights, and what brings both back when an engine is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.residency import actor_bytes
from megatron_pmd.batch import Sample
from megatron_pmd.config import RunConfig
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.device import SharedDevice
from megatron_pmd.distributed import Control
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.handover import Handover
from megatron_pmd.engine.recovery import Recovery
from megatron_pmd.engine.router import Router
from megatron_pmd.engine.sglang_server import expert_parallel
from megatron_pmd.errors import EngineError, EnginesLost, PmdError, StaleWeights
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.processes import connections_possible
from megatron_pmd.rewards.pool import RewardPool
from megatron_pmd.rewards.threaded import ThreadedReward
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.rollout.sampler import Sampler
from megatron_pmd.shared_memory import shared_memory_key
from megatron_pmd.training.rollouts import Drawn, train_rollout
from megatron_pmd.weight_sync.push import PushReport, WeightPush
from megatron_pmd.weight_sync.shards import ShardExport
from megatron_pmd.weight_sync.transport import transport_of


class LiveEngines:
    """The fleet, its weights and its router, kept alive: dead engines start again with current weights."""

    live = True

    def __init__(
        self,
        config: RunConfig,
        control: Control,
        folder: Path,
        tokenizer: Any,
        rewards: RewardPool | ThreadedReward | None,
        console: Console,
        *,
        cpu: bool,
        problems: ProblemSets | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        device: SharedDevice | None = None,
    ) -> None:
        """Starts the engines; they answer only after the first load().

        rewards, problems: the driver's; None elsewhere, and where nothing is taken. interrupted: see Sampler.
        device: the account that the actor keeps, too.
        """
        self._config, self._control, self._tokenizer = config, control, tokenizer
        self._problems, self._rewards = problems, rewards
        self._console, self._interrupted = console, interrupted
        shared = config.rollout.placement == "colocated"
        # it takes milliseconds to look at an engine's processes, and separate engines would stand still
        self.clock = SubphaseClock((lambda: (actor_bytes(), self.engine_bytes())) if shared else None)
        self.fleet = Fleet(config, control, folder, self.clock, cpu=cpu)
        self.handover = self._handover_of(device)
        self.recovery = Recovery(self.fleet, self.handover, control, config.rollout)
        self.router = Router(config.rollout, folder / "logs" / "router.log", self.fleet.keys.api)
        self._shards: ShardExport | None = None
        self._told_of_few_files = False
        self.weight_push = WeightPush(
            transport_of(config, self.fleet, control, folder),
            control,
            shared_memory_key(folder),
            self.clock,
            bucket_bytes=config.sync.bucket_megabytes * 2**20,
            timeout_seconds=config.sync.timeout_seconds,
            verify=config.sync.verify == "full",
            on_device=not cpu and not config.devices_beside_ranks,
            expert_parallel=expert_parallel(config.rollout),
        )

    def _handover_of(self, device: SharedDevice | None) -> Handover:
        return Handover(self.fleet, self.clock, device)

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn | None:
        rollout = None
        if self._problems is not None:
            rollout = train_rollout(self._config, self._problems.train, iteration, carried_over)
        samples = self.draw(rollout, actor, "rollout")
        return Drawn(rollout, samples) if rollout else None

    def ahead(self) -> list[Group]:
        return []

    def refresh(self) -> None: ...

    def attend(self) -> None: ...

    def draw(self, rollout: RolloutGroups | None, actor: Actor, title: str) -> list[Sample]:
        """See RolloutSource. Raises EngineError when engines die again and again."""

        def draw() -> None:
            assert rollout is not None, "the driver knows what to draw"
            self._draw(rollout, title, actor.routing_width)

        self._with_engines(draw, actor, rollout.settings.weight_version if rollout else None)
        return rollout.samples(self._tokenizer) if rollout else []

    def _with_engines(self, draw: Callable[[], None], actor: Actor, version: int | None) -> None:
        """Have the driver draw, again where engines were lost, which are then brought back.

        version: of the actor's weights; the driver's word.
        """
        for attempt in itertools.count():
            failure = self._control.from_driver(_failure_of(draw) if self._control.is_driver else None)
            if failure is None:
                return
            # an engine elsewhere that came back by itself has forgotten the weights it was given
            forgotten = isinstance(failure, StaleWeights) and self._config.engines_elsewhere
            mended = forgotten or isinstance(failure, EnginesLost)
            if not mended or attempt == self._config.rollout.retries:
                raise failure
            self.revive(actor, self._control.from_driver(version), forgotten=forgotten)

    def _draw(self, rollout: RolloutGroups, title: str, routing_width: int) -> None:
        self._tell_of_few_files(rollout)
        sampler = Sampler.of(
            self._config,
            self._endpoint(),
            self._tokenizer,
            self._rewards,  # type: ignore[arg-type]  # None only on ranks that do not drive
            routing_width,
            interrupted=self._asked_meanwhile,
        )
        with self._console.progress(title, rollout.total - rollout.finished) as advance:
            sampler.run(rollout, lambda _: advance())
        self._tell_of_refusals(rollout)

    def _endpoint(self) -> Endpoint:
        sampling = self._config.rollout
        return Endpoint(
            router_url=self.router.url,
            engine_urls=self.fleet.urls,
            headers=self.fleet.keys.headers,
            abort_headers=self.fleet.keys.admin_headers,
            request_timeout_seconds=sampling.request_timeout_seconds,
            retries=sampling.retries,
            any_engine_alive=lambda: self.router.reaches(self.fleet.urls),
            keeps_cache=self._config.rollout.pause == "in_place",
        )

    def _tell_of_refusals(self, rollout: RolloutGroups) -> None:
        accounts = rollout.accounts
        if accounts.first_refusal:
            self._console.say(
                f"{accounts.refusals} requests were refused; {accounts.dropped['refused']} responses were "
                f"dropped in whole groups that could not be begun. The first reason: {accounts.first_refusal}"
            )

    def _asked_meanwhile(self) -> bool:
        """Whether the rollout must end; asked all the time, which shows that its event loop turns."""
        self._control.heartbeat.beat()
        return self._interrupted()

    def _tell_of_few_files(self, rollout: RolloutGroups) -> None:
        possible, wanted = connections_possible(), rollout.total - rollout.finished
        if wanted > possible and not self._told_of_few_files:
            self._told_of_few_files = True
            self._console.say(
                f"{possible} of {wanted} requests are in flight at one time: no more files may be open "
                f"(ulimit -n); with `ulimit -n {4 * wanted + 1024}` before the start all can be"
            )

    def revive(self, actor: Actor, version: int, *, forgotten: bool = False) -> None:
        """Start lost engines and a lost router again; give all engines the current weights if any is new.

        As in the phases sync and resume: in a rollout the actors' parameters have left the device.
        """
        if self._restart(probe=True) or forgotten:
            self.handover.release()
            actor.wake_parameters()
            self._send(actor, version)
            actor.release_parameters()
            self.handover.resume_cache()
        self._serve()

    def _serve(self) -> None:
        """Make the engines routable, and watch them while they generate."""
        self._control.on_driver(lambda: self.router.start(self.fleet.urls))
        self.fleet.watch()

    def _restart(self, *, probe: bool, before_start: Callable[[], None] = lambda: None) -> bool:
        """Start lost engines again, and say so; see Recovery.restart_lost."""
        said = self.recovery.restart_lost(probe=probe, before_start=before_start)
        if said:
            self.router.stop()  # its picture of who is alive is out of date
            self._say(said)
        return bool(said)

    def _say(self, what: str) -> None:
        if what and self._control.is_driver:
            self._console.say(what)

    def make_room(self) -> None:
        self._say(self.recovery.wait_ready())
        self.handover.release()

    def release(self) -> None:
        self.handover.release()

    def load(self, actor: Actor, version: int) -> PushReport:
        """See RolloutSource. Engines lost before or meanwhile are started again, and get everything."""
        if not self.fleet.urls:
            self._say(self.recovery.wait_ready())
        for attempt in itertools.count():
            # an engine sizes its cache, for good, by the memory that it finds free when it starts
            if self._restart(probe=attempt > 0, before_start=actor.release_parameters):
                self.handover.release()
                actor.wake_parameters()
            try:
                return self._send(actor, version)
            except EngineError:
                # what a living engine refuses, it would refuse again
                if attempt == self._config.rollout.restarts or not self.recovery.any_lost():
                    raise
        raise AssertionError("unreachable")

    def _send(self, actor: Actor, version: int) -> PushReport:
        if self._shards is None:
            self._shards = ShardExport(
                actor.bridge, actor.chunks, self._control, actor.shapes, fp8=self._config.rollout.fp8
            )
        return self.weight_push.push(
            self._shards, version, serves=self.fleet.serves, before_load=self.handover.resume_weights
        )

    def resume(self) -> None:
        self.handover.resume_cache()
        self._serve()

    def engine_bytes(self) -> int:
        return self.fleet.engine_bytes()

    def close(self) -> None:
        self.weight_push.close()
        self.router.stop()
        self.fleet.stop()


def _failure_of(draw: Callable[[], None]) -> PmdError | None:
    try:
        draw()
    except PmdError as error:
        return error
    return None
