"""Which ranks run an engine, or a part of one: one server process on each node that the engine reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import LayoutError


def sampled_by(config: RunConfig, *, replay: bool) -> Literal["engines", "servers"] | None:
    """Who makes a run's rollouts: engines of its own, or rollout.servers; None where nobody samples, because
    rollouts are given (replay) or training is supervised."""
    if replay or config.algorithm.objective.supervised:
        return None
    return "servers" if config.rollout.servers else "engines"


@dataclass(frozen=True)
class EnginePart:
    """What of the engines one rank runs: the server process of one engine on one node."""

    engine: int
    """Counts the engines of a run from 0."""
    nodes: tuple[int, ...]
    """The engine's, in the order of its tensor-parallel ranks, as torchrun counts nodes."""
    ranks: tuple[int, ...]
    """Those whose devices the engine computes on: position i shares its with the engine's rank i."""
    node: int
    """Which of the nodes this part is on, from 0."""

    @property
    def leads(self) -> bool:
        """Whether it is the engine's first: only that one is called."""
        return self.node == 0


def part_of(rank: int, nodes: Sequence[int], ranks_per_engine: int, devices: int) -> EnginePart | None:
    """What a rank runs; None for one that runs nothing.

    nodes: of every rank. devices: an engine computes where so many of its ranks, the first ones, are.
    Raises LayoutError, on every rank alike, for an engine that nodes would have unequal parts of (SGLang cuts
    it into equal ones), or that is on several nodes although it would fit one.
    """
    for first in range(0, len(nodes), ranks_per_engine):
        _check(first // ranks_per_engine, list(nodes[first : first + devices]), nodes)
    engine = rank // ranks_per_engine
    first = engine * ranks_per_engine
    serving = list(nodes[first : first + devices])
    reached = tuple(dict.fromkeys(serving))
    if rank >= first + devices or rank != first + serving.index(nodes[rank]):
        return None
    return EnginePart(engine, reached, tuple(range(first, first + len(serving))), reached.index(nodes[rank]))


def _check(engine: int, serving: list[int], nodes: Sequence[int]) -> None:
    reached = list(dict.fromkeys(serving))
    shares = [serving.count(node) for node in reached]
    fits_one = len(serving) <= max(nodes.count(node) for node in reached)
    if len(reached) > 1 and (fits_one or len(set(shares)) > 1):
        raise LayoutError(
            f"engine {engine} of rollout.tensor_parallel={len(serving)} would have "
            f"{' + '.join(map(str, shares))} ranks on nodes {', '.join(map(str, reached))}; "
            "set tensor_parallel and ranks_per_engine so that whole engines fill a node, or one whole nodes"
        )


def engines_beside(engine: int, config: RunConfig) -> tuple[int, ...]:
    """The engines on the machine of this one, elsewhere: those of an engine node, or a host's servers."""
    hosts = [urlsplit(server).hostname for server in config.rollout.servers]
    if hosts:
        return tuple(number for number, host in enumerate(hosts) if host == hosts[engine])
    first = engine - engine % config.engines_per_node
    return tuple(range(first, first + config.engines_per_node))


def senders_of(rank: int, nodes: Sequence[int], config: RunConfig) -> tuple[int, ...]:
    """The ranks that send weights, together, to the machine of this rank's engine, which is elsewhere.

    The first leads the first engine there. The others are those of its node that belong to an engine of that
    machine: they have network cards, too. nodes: of every rank.
    """
    size = config.ranks_per_engine
    engines = engines_beside(rank // size, config)
    ranks = [number for engine in engines for number in range(engine * size, (engine + 1) * size)]
    return tuple(number for number in ranks if nodes[number] == nodes[ranks[0]])


def groups_of(senders: Iterable[Sequence[int]]) -> int:
    """Process groups towards a machine of engines elsewhere. Each begins at another of the senders, so there
    are as many as the machine with the fewest has. senders: what senders_of() says of every rank."""
    return min(len(ranks) for ranks in senders)


def ranks_of_node(config: RunConfig, accelerators: int) -> int:
    """Actor ranks on a node: as many as it holds with their separate engines, were it alone.

    Raises LayoutError where it does not even hold one engine and its ranks.
    """
    together = config.ranks_per_engine + config.devices_beside_ranks
    most = accelerators
    if config.devices_beside_ranks:
        most = accelerators // together * config.ranks_per_engine
    if not most:
        raise LayoutError(
            f"a node has {accelerators} GPUs; rollout.ranks_per_engine={config.ranks_per_engine} ranks and "
            f"an engine of their own (rollout.tensor_parallel={config.rollout.tensor_parallel}) do not fit"
        )
    return min(most, config.layout.ranks)


def devices_of_node(config: RunConfig, ranks: int) -> int:
    """Devices that so many actor ranks of a node take, with their separate engines."""
    return ranks + ranks // config.ranks_per_engine * config.devices_beside_ranks


def check_parts(ranks: int, ranks_per_node: int, ranks_per_engine: int, devices: int) -> None:
    """Before anything starts: raises part_of's LayoutError for nodes that are filled one after the other."""
    part_of(0, [rank // ranks_per_node for rank in range(ranks)], ranks_per_engine, devices)
