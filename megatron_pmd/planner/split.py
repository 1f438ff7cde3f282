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


def split_of(plan: Plan) -> Split | None:
    """The recipe's own with rollout.placement=separate, whose layout is the trainer's; else the balanced."""
    if plan.config.rollout.placement == "separate":
        return _split(plan, plan.config.engines, plan)
    return balanced_split(plan)


def balanced_split(plan: Plan) -> Split | None:
    """The split whose slower side takes least time; None if the devices cannot be split.

    Each side has whole nodes where there are several. The trainer keeps its tensor, pipeline and context
    sizes, and what it holds in an update and in a save fits its devices.
    """
    return min(_splits(plan), key=lambda split: split.iteration_seconds, default=None)


def _splits(plan: Plan) -> Iterator[Split]:
    config, layout, per_engine = plan.config, plan.config.layout, plan.config.devices_per_engine
    unit = plan.machines.devices_per_node if plan.nodes > 1 else 1
    for replicas in range(1, layout.data):
        ranks = replicas * (layout.ranks // layout.data)
        engines, rest = divmod(layout.ranks - ranks, per_engine)
        if ranks % unit or rest:
            continue
        try:
            fewer = override(config, [f"layout.data={replicas}"])
            trainer = make_plan(fewer, plan.machines, plan.assumptions)
        except ConfigError:
            continue
        if not trainer.trainer_problems:
            yield _split(plan, engines, trainer)


def _split(plan: Plan, engines: int, trainer: Plan) -> Split:
    config, shape, assume = plan.config, plan.shape, plan.assumptions
    return Split(
        engines,
        engines * config.devices_per_engine,
        trainer,
        rollout_seconds(shape, config, plan.machines, plan.cache, engines, assume),
        trainer.cost.seconds["anchor"] + trainer.cost.seconds["update"],
        transfer_seconds(shape, config, assume),
    )
