"""The plan of a run: what it needs of the machines, whether it fits, and the nearest layout that does."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Literal

from megatron_pmd.config import RunConfig, build
from megatron_pmd.engine.placement import check_parts, sampled_by
from megatron_pmd.errors import ConfigError, LayoutError
from megatron_pmd.observe.folder import flatten
from megatron_pmd.planner import memory
from megatron_pmd.planner.cost import Cost, cost
from megatron_pmd.planner.hardware import Assumptions, Machines
from megatron_pmd.planner.shapes import Shape, shape_of
from megatron_pmd.planner.sharding import Stage, stages

MOST_GROWTH = 16
"""How many times the ranks asked for a nearest layout may have."""


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    machines: Machines
    assumptions: Assumptions
    shape: Shape
    stages: list[Stage]
    phases: dict[str, memory.Owners]
    """Bytes on the fullest device, by phase and owner."""
    host: dict[str, memory.Owners]
    """Bytes on the fullest node, by phase and owner."""
    cache: memory.Cache
    """Of the run's own engines; it has a meaning only if there are some."""
    cost: Cost
    replay: bool = False
    """Whether rollouts are given."""

    @property
    def sampled_by(self) -> Literal["engines", "servers"] | None:
        """Only engines of the run's own are planned: see sampled_by of engine/placement.py."""
        return sampled_by(self.config, replay=self.replay)

    @property
    def checkpoint_bytes(self) -> int:
        return memory.checkpoint_bytes(self.shape, self.config)

    @property
    def nodes(self) -> int:
        return self.machines.nodes(self.config)

    @property
    def host_bytes(self) -> float:
        """On the fullest node in its fullest phase."""
        return max(sum(owners.values()) for owners in self.host.values())

    @property
    def problems(self) -> list[str]:
        """Why this cannot run; empty when it fits."""
        return [*self.layout_problems, *self._sizing_problems(), *self._length_problems()]

    @property
    def layout_problems(self) -> list[str]:
        """Those that another layout could mend."""
        return [*self._device_problems(), *self._engine_problems(), *self._node_problems()]

    @property
    def trainer_problems(self) -> list[str]:
        """Those of a trainer without engines; what engines leave on its devices is counted all the same."""
        return [*self._device_problems(("update", "save")), *self._node_problems()]

    def _device_problems(self, phases: tuple[str, ...] = ("update", "save", "sync")) -> list[str]:
        if self.machines.shares_host_memory:
            return []
        device, found = self.machines.device, []
        room = device.memory_bytes * self.assumptions.safety
        for phase in [phase for phase in phases if phase in self.phases]:
            owners = self.phases[phase]
            need = sum(owners.values())
            if need > room:
                found.append(
                    f"{phase} needs {gigabytes(need)} on the fullest {device.name}, "
                    f"which has {gigabytes(room)} to give ({_greatest(owners)})"
                )
        return found

    def _sizing_problems(self) -> list[str]:
        """Of engines that give their KV cache what others need: it is sized before those begin to exist."""
        if self.machines.shares_host_memory or self.sampled_by != "engines":
            return []
        device, owners = self.machines.device, self.phases["rollout"]
        room = device.memory_bytes * self.assumptions.safety
        excess = sum(owners.values()) - room
        if excess <= 0:
            return []
        share = memory.mem_fraction_static(self.shape, self.config, device.memory_bytes)
        filled = owners["engine weights"] + owners["KV cache"]
        smaller = math.floor(1000 * share * (filled - excess) / filled) / 1000
        return [
            f"rollout: of the {gigabytes(room)} that an {device.name} has to give, an engine's weights and "
            f"cache take {gigabytes(filled)} with mem_fraction_static={share:g}, its graphs and activations "
            f"and what else is left there {gigabytes(sum(owners.values()) - filled)}: set "
            f"mem_fraction_static={smaller:g} in rollout.sglang"
        ]

    def _engine_problems(self) -> list[str]:
        if self.sampled_by != "engines":
            return []
        config, longest = (
            self.config,
            self.config.batch.max_prompt_tokens + self.config.batch.max_response_tokens,
        )
        found = []
        if unaligned := memory.unaligned_widths(self.shape, config):
            found.append(
                f"FP8 engines of rollout.tensor_parallel={config.rollout.tensor_parallel} cannot cut "
                f"{', '.join(unaligned)} into blocks of {memory.FP8_BLOCK}: use fewer, or ep_size, "
                "moe_dense_tp_size and moe_a2a_backend in rollout.sglang"
            )
        if self.cache.longest_samples >= 1:
            return found
        return [
            *found,
            f"an engine of rollout.tensor_parallel={config.rollout.tensor_parallel} has "
            f"{gigabytes(self.phases['rollout']['engine weights'])} of weights on each device and room for "
            f"{self.cache.tokens:,} tokens of KV cache: not for one sample of {longest:,}",
        ]

    def _node_problems(self) -> list[str]:
        config, machines, found = self.config, self.machines, []
        room = machines.host_memory_bytes * self.assumptions.safety
        for phase, owners in self.host.items():
            need = sum(owners.values())
            if need > room:
                found.append(
                    f"{phase}: {gigabytes(need)} of a node's host memory needed, {gigabytes(room)} to give "
                    f"({_greatest(owners)})"
                )
        ranks, per_node = config.layout.ranks, machines.ranks_per_node(config)
        if ranks % per_node:
            beside = f", {per_node} ranks with their engines each" if config.devices_beside_ranks else ""
            found.append(f"{ranks} ranks do not fill nodes of {machines.devices_per_node} devices{beside}")
        engines = config.devices_per_engine_node
        if (
            self.sampled_by == "engines"
            and engines > machines.devices_per_node
            and not machines.shares_host_memory
        ):
            found.append(
                f"layout.engine_nodes={config.layout.engine_nodes}: {config.engines_per_node} engines of "
                f"rollout.tensor_parallel={config.rollout.tensor_parallel} need {engines} devices of a node, "
                f"and it has {machines.devices_per_node}"
            )
        try:
            check_parts(ranks, per_node, config.ranks_per_engine, config.devices_per_engine)
        except LayoutError as error:
            found.append(str(error))
        return found

    def _length_problems(self) -> list[str]:
        batch, limit = self.config.batch, self.shape.context_limit
        longest = batch.max_prompt_tokens + batch.max_response_tokens
        if longest <= limit or not limit:
            return []
        return [f"samples of {longest:,} tokens: {self.shape.name} has {limit:,} positions"]


def _greatest(owners: memory.Owners) -> str:
    greatest = sorted(owners.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{owner} {gigabytes(size)}" for owner, size in greatest)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def make_plan(
    config: RunConfig, machines: Machines, assumptions: Assumptions | None = None, *, replay: bool = False
) -> Plan:
    """Plan a run. Raises ModelError for an unknown model, LayoutError for a layout it cannot have.

    replay: it trains on rollouts that are given.
    """
    assume, shape = assumptions or Assumptions(), shape_of(config.model.path)
    all_stages = stages(shape, config)
    kv = memory.cache(shape, config, machines, assume)
    return Plan(
        config=config,
        machines=machines,
        assumptions=assume,
        shape=shape,
        stages=all_stages,
        phases=memory.device_phases(shape, config, all_stages, machines, assume, replay=replay),
        host=memory.host_phases(shape, config, all_stages, machines, assume),
        cache=kv,
        cost=cost(shape, config, all_stages, machines, kv, assume, replay=replay),
        replay=replay,
    )


def check(plan: Plan) -> None:
    """Raise LayoutError when the plan does not fit, with the nearest one that does."""
    if not plan.problems:
        return
    near = nearest(plan) if plan.layout_problems else None
    if not plan.layout_problems:
        hint = "the layout fits"
    elif near is None:
        hint = f"no layout of up to {MOST_GROWTH} times as many ranks fits"
    else:
        hint = f"the nearest that fits: {' '.join(difference(plan.config, near.config))} ({near.nodes} nodes)"
    raise LayoutError(f"{plan.config.name} does not fit:\n  " + "\n  ".join(plan.problems) + f"\n{hint}")


def difference(before: RunConfig, after: RunConfig) -> list[str]:
    """The settings by which a candidate differs, as one would type them behind the recipe."""
    there, here = (flatten(config.resolved().model_dump(mode="json")) for config in (before, after))
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in here.items()
        if there.get(key, ...) != value
    ]


def nearest(plan: Plan) -> Plan | None:
    """The plan that fits and differs least: first on as many ranks, then on twice as many, and so on.

    Distance is how often a size was doubled or halved; recomputing activations counts as one.
    """
    growth = 1
    while growth <= MOST_GROWTH:
        for _, values in sorted(_candidates(plan, growth), key=lambda candidate: candidate[0]):
            try:
                candidate = make_plan(build(values), plan.machines, plan.assumptions, replay=plan.replay)
            except ConfigError:
                continue
            if not candidate.layout_problems:
                return candidate
        growth *= 2
    return None


def _candidates(plan: Plan, growth: int) -> list[tuple[float, dict]]:
    config, per_node = plan.config, plan.machines.devices_per_node
    layout, ranks = config.layout, config.layout.ranks * growth
    powers = [2**i for i in range(int(math.log2(ranks)) + 1)]
    tensors = [size for size in powers if size <= per_node]
    engines = sorted({config.rollout.tensor_parallel, *powers})
    recompute = [config.actor.recompute, *(["full"] if config.actor.recompute != "full" else [])]
    experts = powers if plan.shape.feed_forward.experts else [1]
    found = []
    sizes = itertools.product(tensors, sorted({layout.pipeline, *powers}), experts, engines, recompute)
    for tensor, pipeline, expert, engine, again in sizes:
        if ranks % (tensor * pipeline * layout.context) or ranks % engine:
            continue
        data = ranks // (tensor * pipeline * layout.context)
        pairs = [
            (tensor, layout.tensor),
            (pipeline, layout.pipeline),
            (expert, layout.expert),
            (engine, config.rollout.tensor_parallel),
        ]
        distance = sum(abs(math.log2(new / old)) for new, old in pairs) + (again != config.actor.recompute)
        values = config.model_dump(mode="json")
        values["layout"] |= {"tensor": tensor, "pipeline": pipeline, "expert": expert, "data": data}
        values["rollout"]["tensor_parallel"] = engine
        if again != config.actor.recompute:
            values["actor"] |= {"recompute": again, "recompute_modules": []}
        found.append((distance, values))
    return found
