"""Rollouts from engines with devices of their own, sampled by a process of its own while the actor trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_pmd.actor.actor import Actor
from megatron_pmd.config import RunConfig
from megatron_pmd.device import SharedDevice
from megatron_pmd.distributed import Control
from megatron_pmd.engine.handover import Handover, Pauses
from megatron_pmd.engine.recovery import Restarts
from megatron_pmd.engine.router import reaches
from megatron_pmd.errors import SamplerLost
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.training.flow import Flow
from megatron_pmd.training.live_engines import LiveEngines
from megatron_pmd.training.production import Ahead
from megatron_pmd.training.rollouts import Drawn
from megatron_pmd.training.sampler_process import SamplerProcess, Setup
from megatron_pmd.weight_sync.push import PushReport

T = TypeVar("T")


class SeparateEngines(LiveEngines):
    """As LiveEngines, but the engines keep their memory, and go on sampling in the phases of the actor.

    An update pauses them.
    """

    handover: Pauses

    def __init__(
        self,
        config: RunConfig,
        control: Control,
        folder: Path,
        *parts: Any,
        ahead: Ahead | None,
        **options: Any,
    ) -> None:
        """Starts the engines and the sampler. Raises ConfigError for a reward that cannot be loaded.

        ahead: what a checkpoint has of later iterations; the driver's. The rest as LiveEngines.
        """
        super().__init__(config, control, folder, *parts, **options)
        self._ahead = ahead
        self._sampler: SamplerProcess | None = None
        self._published: tuple[int, int] | None = None
        """Weight version, and experts that a token goes to (Sampler.of)."""
        self._restarts = Restarts(config.rollout.restarts)
        """Of the sampler. One has succeeded when a rollout is taken."""
        self._folder = folder
        self._trained = Flow()
        """What has come from the sampler."""
        control.on_driver(self._started)

    def _handover_of(self, device: SharedDevice | None) -> Handover:
        return Pauses(self.fleet, self.clock, self._config.rollout.pause)

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn | None:
        taken: list[Drawn] = []
        config = self._config

        def take() -> None:
            # all that is ahead may be before it in the engines' queues
            seconds = config.longest_rollout_seconds * (config.rollout.staleness + 1)
            rollout, ahead, flow = self._asked(lambda sampler: sampler.take(iteration, seconds))
            self._know(ahead)
            self._tell_of_refusals(rollout)
            self._trained.put("trained", (member for group in rollout.chosen for member in group.members))
            flow.check_handed_over(self._trained)
            taken.append(Drawn(rollout, rollout.samples(self._tokenizer), flow.values()))
            self._restarts.made = 0

        self._with_engines(take, actor, iteration)
        return taken[0] if taken else None

    def _draw(self, rollout: RolloutGroups, title: str, routing_width: int) -> None:
        seconds = self._config.longest_rollout_seconds
        drawn = self._asked(lambda sampler: sampler.draw(rollout, seconds))
        rollout.groups, rollout.accounts = drawn.groups, drawn.accounts
        rollout.complete_groups = drawn.complete_groups
        self._tell_of_refusals(rollout)

    def ahead(self) -> list[Group]:
        return self._ahead.groups if self._ahead else []

    def refresh(self) -> None:
        self._control.on_driver(lambda: self._know(self._asked(SamplerProcess.ahead)))

    def _know(self, ahead: Ahead) -> None:
        assert self._problems is not None, "the driver has the prompts"
        self._ahead = ahead
        self._problems.train.load_state(ahead.prompts)

    def load(self, actor: Actor, version: int) -> PushReport:
        """As LiveEngines.load; then they go on at once: nothing has to leave their devices first."""
        report = super().load(actor, version)
        super().resume()
        return report

    def resume(self) -> None:
        """They have gone on."""

    def _send(self, actor: Actor, version: int) -> PushReport:
        report = super()._send(actor, version)
        self._published = version, actor.routing_width
        return report

    def _serve(self) -> None:
        """The sampler expects the new version before an engine can answer with it."""
        self._control.on_driver(lambda: self.router.start(self.fleet.urls))
        self._control.on_driver(lambda: self._asked(self._publish))
        self.handover.go_on()
        self.fleet.watch()

    def _publish(self, sampler: SamplerProcess, *, wait: bool = True) -> None:
        if self._published is not None:
            alive = functools.partial(reaches, self.router.url, self.fleet.urls)  # a pipe takes no lambda
            endpoint = dataclasses.replace(self._endpoint(), any_engine_alive=alive)
            sampler.publish(*self._published, endpoint, wait=wait)

    def attend(self) -> None:
        """A sampler that was killed is started again, and gets ready while the actor trains.

        One that may not be started any more ends the run when it is asked for samples.
        """
        try:
            if self._sampler is not None:
                self._sampler.check_alive()
        except SamplerLost as lost:
            if self._restarts.left:
                self._replace(lost)

    def _asked(self, ask: Callable[[SamplerProcess], T]) -> T:
        """The sampler's answer; one that was killed is started again from what is known of it."""
        while True:
            try:
                return ask(self._started())
            except SamplerLost as lost:
                if not self._restarts.left:
                    raise
                self._replace(lost)

    def _replace(self, lost: SamplerLost) -> None:
        """Start another, which tells at the next call of it whether it came up."""
        self._restarts.made += 1
        self._console.say(f"{lost} It is started again, and goes on with the groups that were complete.")
        self._sampler = self._start()

    def _started(self) -> SamplerProcess:
        if self._sampler is None:
            self._sampler = self._start()
        self._sampler.wait_ready()
        return self._sampler

    def _start(self) -> SamplerProcess:
        """Does not wait until it serves."""
        assert self._problems is not None, "only the driver has a sampler"
        assert self._ahead is not None, "and knows what is ahead"
        # before weights are published, a checkpoint's are the newest
        newest = self._published[0] if self._published else self._ahead.first
        setup = Setup(self._config, self._problems.train, self._ahead, self._folder, newest)
        sampler = SamplerProcess(setup, self._asked_meanwhile)
        self._publish(sampler, wait=False)
        return sampler

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
        super().close()
