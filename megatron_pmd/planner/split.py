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
    """Engines with devices of their own, and a trainer on the others."""

    trainer: Plan
    """Of a recipe with rollout.placement=separate: its layout is the trainer's."""
    sampling_seconds: float
    """In which the engines decode one rollout."""
    training_seconds: float
    """Anchor and update of it."""
    sync_seconds: float
    """Both sides stand still."""

    @property
    def engines(self) -> int:
        return self.trainer.config.engines

    @property
    def engine_devices(self) -> int:
        return self.engines * self.trainer.config.rollout.tensor_parallel

    @property
    def iteration_seconds(self) -> float:
        """Of an overlapped run without a checkpoint."""
        return max(self.sampling_seconds, self.training_seconds) + self.sync_seconds


def split_of(plan: Plan) -> Split | None:
    """The recipe's own with rollout.placement=separate; else the balanced one."""
    return _split(plan, plan) if plan.config.rollout.placement == "separate" else balanced_split(plan)


def iteration_seconds(plan: Plan) -> float:
    """Of one iteration without a checkpoint, as the recipe has its engines."""
    separate = plan.sampled_by == "engines" and plan.config.rollout.placement == "separate"
    return _split(plan, plan).iteration_seconds if separate else plan.cost.iteration_seconds


def balanced_split(plan: Plan) -> Split | None:
    """The split of a plan's devices whose slower side takes least time; None if they cannot be split.

    Every node has both, so many ranks and the engine that belongs to them, once or several times
    (launch/script.py); or whole nodes are the engines' (layout.engine_nodes). The trainer keeps its tensor,
    pipeline and context sizes, and what it holds in an update and in a save fits its devices.
    """
    return min(_splits(plan), key=lambda split: split.iteration_seconds, default=None)


def _splits(plan: Plan) -> Iterator[Split]:
    replica = plan.config.layout.ranks // plan.config.layout.data
    for ranks, ranks_each, nodes in (*_on_shared_nodes(plan), *_on_nodes_of_their_own(plan)):
        if ranks % replica:
            continue
        settings = [
            "rollout.placement=separate", "rollout.partial=null", f"rollout.ranks_per_engine={ranks_each}",
            f"layout.data={ranks // replica}", f"layout.engine_nodes={nodes}",
            f"sync.transport={'broadcast' if nodes else 'ipc'}",
        ]  # fmt: skip
        try:
            trainer = make_plan(override(plan.config, settings), plan.machines, plan.assumptions)
        except ConfigError:
            continue
        if not trainer.trainer_problems:
            yield _split(plan, trainer)


def _on_shared_nodes(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Ranks, those of an engine, and 0 nodes with engines alone."""
    devices, per_engine = plan.config.layout.ranks, plan.config.devices_per_engine
    together = min(plan.machines.devices_per_node, devices)
    for ranks_each in range(1, together - per_engine + 1):
        ranks, rest = divmod(devices * ranks_each, ranks_each + per_engine)
        if not rest and together % (ranks_each + per_engine) == 0:
            yield ranks, ranks_each, 0


def _on_nodes_of_their_own(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Ranks, those of which one leads an engine, and how many nodes the engines have."""
    per_node, size = plan.machines.devices_per_node, plan.config.rollout.tensor_parallel
    all_nodes, rest = divmod(plan.config.layout.ranks, per_node)
    if rest or per_node % size:
        return
    for nodes in range(1, all_nodes):
        ranks, engines = (all_nodes - nodes) * per_node, nodes * per_node // size
        if ranks % engines == 0:
            yield ranks, ranks // engines, nodes


def _split(plan: Plan, trainer: Plan) -> Split:
    shape, assume, engines = plan.shape, plan.assumptions, trainer.config.engines
    return Split(
        trainer,
        rollout_seconds(shape, trainer.config, plan.machines, plan.cache, engines, assume),
        trainer.cost.seconds["anchor"] + trainer.cost.seconds["update"],
        transfer_seconds(shape, trainer.config, assume),
    )
