"""A separate placement: how many of a plan's devices should be the engines' alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError
from megatron_pmd.planner.cost import rollout_seconds, transfer_seconds
from megatron_pmd.planner.planning import Plan, make_plan


@dataclass(frozen=True)
class Split:
    """The devices of a plan, shared out between engines and a trainer of fewer data-parallel replicas."""

    engines: int
    engine_devices: int
    trainer: Plan
    """Of the trainer's devices alone."""
    sampling_seconds: float
    """In which the engines decode one rollout."""
    training_seconds: float
    """Anchor and update of it."""
    sync_seconds: float
    """Both sides stand still."""

    @property
    def iteration_seconds(self) -> float:
        """Of an overlapped run without a checkpoint."""
        return max(self.sampling_seconds, self.training_seconds) + self.sync_seconds


def balanced_split(plan: Plan) -> Split | None:
    """The split whose slower side takes least time; None if the devices cannot be split.

    Each side has whole nodes where there are several. The trainer keeps its tensor, pipeline and context
    sizes, and what it holds in an update and in a save fits its devices.
    """
    return min(_splits(plan), key=lambda split: split.iteration_seconds, default=None)


def _splits(plan: Plan) -> Iterator[Split]:
    config, shape, machines, assume = plan.config, plan.shape, plan.machines, plan.assumptions
    layout, per_engine = config.layout, config.devices_per_engine
    unit = machines.devices_per_node if plan.nodes > 1 else 1
    for replicas in range(1, layout.data):
        ranks = replicas * (layout.ranks // layout.data)
        engines, rest = divmod(layout.ranks - ranks, per_engine)
        if ranks % unit or rest:
            continue
        try:
            fewer = override(config, [f"layout.data={replicas}"])
            trainer = make_plan(fewer, machines, assume)
        except ConfigError:
            continue
        if trainer.trainer_problems:
            continue
        seconds = trainer.cost.seconds
        yield Split(
            engines,
            engines * per_engine,
            trainer,
            rollout_seconds(shape, config, machines, plan.cache, engines, assume),
            seconds["anchor"] + seconds["update"],
            transfer_seconds(shape, config, assume),
        )
