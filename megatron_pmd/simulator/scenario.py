"""What is played: engines, trainer, rules and failures, as numbers; and those of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_pmd.config import PartialRollouts
from megatron_pmd.planner.cost import decode_step_seconds, transfer_seconds
from megatron_pmd.planner.planning import Plan
from megatron_pmd.planner.split import Split

Mode = Literal["colocated", "partial", "overlapped"]


@dataclass(frozen=True)
class EngineFleet:
    count: int
    devices_each: int
    step_seconds: tuple[float, ...]
    """Of one decoding step, by the number of running requests, from 1 to the slots of an engine."""

    @property
    def slots(self) -> int:
        return len(self.step_seconds)


@dataclass(frozen=True)
class TrainerTimes:
    """Seconds in which the trainer does each thing."""

    devices: int
    per_token: float
    """Anchor and update, for each token of prompts and responses."""
    release: float = 0.0
    """From the end of a rollout until the trainer has its devices."""
    sync: float = 0.0
    """From the last step until engines decode under the new weights."""
    save: float = 0.0
    """In which training stands still."""
    write: float = 0.0
    """Of a checkpoint to the disk, beside what follows; the next save waits for it."""


@dataclass(frozen=True)
class Rules:
    prompts_per_rollout: int
    samples_per_prompt: int
    prompts_per_step: int = 1
    partial: PartialRollouts | None = None
    staleness: int | None = None
    """Iterations; engines and trainer have devices of their own. None: they share theirs, in turn."""
    save_every: int | None = None
    """Iterations."""


@dataclass(frozen=True)
class Failures:
    per_device_second: float = 0.0
    """Each ends what runs on its device; they come as a Poisson process, and none while a run restarts."""
    restart_seconds: float = 600.0
    """From a failure until the run, or a lost engine, works again."""


@dataclass(frozen=True)
class Scenario:
    fleet: EngineFleet
    trainer: TrainerTimes
    rules: Rules
    failures: Failures = Failures()

    @property
    def mode(self) -> Mode:
        if self.rules.staleness is not None:
            return "overlapped"
        return "partial" if self.rules.partial else "colocated"

    @property
    def devices(self) -> int:
        """Of engines and trainer together."""
        engines = self.fleet.count * self.fleet.devices_each
        return self.trainer.devices + (engines if self.mode == "overlapped" else 0)


def colocated(plan: Plan, partial: PartialRollouts | None, failures: Failures) -> Scenario:
    """The run of a plan, whose engines use the trainer's devices in turn."""
    seconds, trainer = plan.cost.seconds, _trainer(plan)
    times = replace(trainer, release=seconds["release"], sync=seconds["sync"])
    return Scenario(_fleet(plan, plan.config.engines), times, _rules(plan, partial=partial), failures)


def overlapped(plan: Plan, split: Split, staleness: int, failures: Failures) -> Scenario:
    """The same devices, some of which are the engines' alone."""
    moved = transfer_seconds(plan.shape, plan.config, plan.assumptions)
    return Scenario(
        _fleet(plan, split.engines),
        replace(_trainer(split.trainer), sync=moved),
        _rules(plan, staleness=staleness),
        failures,
    )


def _fleet(plan: Plan, engines: int) -> EngineFleet:
    def step(running: int) -> float:
        return decode_step_seconds(
            plan.shape, plan.config, plan.machines, plan.cache, running, plan.assumptions
        )

    steps = tuple(step(running) for running in range(1, plan.cache.slots + 1))
    return EngineFleet(engines, plan.config.rollout.tensor_parallel, steps)


def _trainer(plan: Plan) -> TrainerTimes:
    seconds, asynchronous = plan.cost.seconds, plan.config.checkpoint.asynchronous
    return TrainerTimes(
        devices=plan.config.layout.ranks,
        per_token=(seconds["anchor"] + seconds["update"]) / plan.cost.tokens,
        save=seconds["save"] + (0.0 if asynchronous else seconds["write"]),
        write=seconds["write"] if asynchronous else 0.0,
    )


def _rules(plan: Plan, partial: PartialRollouts | None = None, staleness: int | None = None) -> Rules:
    batch = plan.config.batch
    return Rules(
        batch.prompts_per_rollout,
        batch.samples_per_prompt,
        batch.prompts_per_step,
        partial,
        staleness,
        plan.config.checkpoint.every,
    )
