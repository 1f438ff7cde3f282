"""What a played run comes to: responses and tokens by their fate, seconds by what was done in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Self

from megatron_pmd.simulator.scenario import Scenario


@dataclass
class Accounts:
    """Responses, and the tokens decoded of them. started = trained + waiting + in flight + dropped + lost."""

    started: int = 0
    trained: int = 0
    waiting: int = 0
    """Of complete groups that nothing was trained on yet."""
    in_flight: int = 0
    """Of groups that are not complete."""
    dropped: int = 0
    """Too old to be gone on with."""
    lost: int = 0
    """Started after the checkpoint that a failure took the run back to."""
    trained_tokens: float = 0.0
    kept_tokens: float = 0.0
    """Of what is waiting or in flight."""
    dropped_tokens: float = 0.0
    lost_tokens: float = 0.0
    """To failures of the run or of an engine."""


@dataclass
class Times:
    """Seconds since the start."""

    seconds: float = 0.0
    """Of the run."""
    training: float = 0.0
    """Anchor and update."""
    waiting: float = 0.0
    """The trainer has no rollout."""
    syncing: float = 0.0
    """Release and sync."""
    saving: float = 0.0
    lost: float = 0.0
    """Since the checkpoint that a failure took the run back to, and until it worked again."""
    engines_working: float = 0.0
    """Engine seconds with at least one request running."""
    slots_in_use: float = 0.0
    """Slot seconds."""
    samples: int = 0
    """Trained on."""
    response_tokens: int = 0
    """Trained on."""

    def __sub__(self, before: Self) -> Self:
        return type(self)(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Played:
    """A run of so many iterations. Shares and rates are of the time after the first ones, which fill it."""

    scenario: Scenario
    accounts: Accounts
    times: Times
    """After the iterations that fill the run."""
    ends: tuple[float, ...]
    """Of each iteration, seconds since the start."""
    trained: tuple[int, ...]
    """Samples, by then."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Responses trained on, by how many updates after their first token."""
    failures: int = 0
    """Of the run."""
    engine_failures: int = 0
    decoded_tokens: float = 0.0

    @property
    def rollout_seconds(self) -> float:
        """In which as many samples are trained on as a whole rollout has."""
        per_iteration = self.scenario.rules.prompts_per_rollout * self.scenario.rules.samples_per_prompt
        return self.times.seconds / (self.times.samples / per_iteration)

    @property
    def samples_per_second(self) -> float:
        return self.times.samples / self.times.seconds

    @property
    def tokens_per_second_and_device(self) -> float:
        """Response tokens trained on."""
        return self.times.response_tokens / self.times.seconds / self.scenario.devices

    @property
    def trainer_waits(self) -> float:
        """Share of the time in which the trainer waits for a rollout."""
        return self.times.waiting / self.times.seconds

    @property
    def slots_used(self) -> float:
        """Share of the engines' slots that decode, while engines could: not while the trainer has their
        devices."""
        fleet, times = self.scenario.fleet, self.times
        alone = self.scenario.mode == "overlapped"
        return times.slots_in_use / (fleet.count * fleet.slots * (times.seconds if alone else times.waiting))

    @property
    def device_shares(self) -> dict[str, float]:
        """Shares of the devices' time by what they do in it; together 1.

        `idle`: an engine without a request, and a trainer without a rollout on devices that are its alone.
        """
        fleet, times, trainer = self.scenario.fleet, self.times, self.scenario.trainer
        alone, whole = self.scenario.mode == "overlapped", self.scenario.devices * times.seconds
        syncing = self.scenario.devices if alone else trainer.devices
        shares = {
            "decode": fleet.devices_each * times.engines_working / whole,
            "train": trainer.devices * times.training / whole,
            "sync": syncing * times.syncing / whole,
            "save": trainer.devices * times.saving / whole,
            "lost to failures": self.time_lost,
        }
        return shares | {"idle": max(0.0, 1 - sum(shares.values()))}  # but for rounding it is not less

    @property
    def time_lost(self) -> float:
        """Share of the time that failures cost: what is done again, and restarts."""
        return self.times.lost / self.times.seconds

    @property
    def mean_staleness(self) -> float:
        return sum(age * count for age, count in self.staleness.items()) / self.staleness.total()

    @property
    def max_staleness(self) -> int:
        return max(self.staleness)
