"""Which ranks run an engine, or a part of one: one server process on each node that the engine reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pmd.errors import LayoutError


@dataclass(frozen=True)
class Place:
    """What of the engines one rank runs."""

    engine: int
    """Counts the engines of a run from 0."""
    nodes: tuple[int, ...]
    """The engine's, in the order of its tensor-parallel ranks, as torchrun counts nodes."""
    part: int
    """Which of these this rank's is. The rank with the first part leads the engine: only it makes calls."""


def place_of(rank: int, nodes: Sequence[int], ranks_per_engine: int, tensor_parallel: int) -> Place | None:
    """The place of a rank; None for one that runs nothing.

    nodes: of every rank. An engine computes where the first `tensor_parallel` of its ranks are.
    Raises LayoutError for an engine that nodes would have unequal parts of: SGLang cuts it into equal ones.
    """
    engine = rank // ranks_per_engine
    first = engine * ranks_per_engine
    serving = list(nodes[first : first + tensor_parallel])
    reached = tuple(dict.fromkeys(serving))
    shares = [serving.count(node) for node in reached]
    if len(set(shares)) > 1:
        raise LayoutError(
            f"engine {engine} (rollout.tensor_parallel={tensor_parallel}, "
            f"ranks_per_engine={ranks_per_engine}) would have {' + '.join(map(str, shares))} ranks "
            f"on nodes {', '.join(map(str, reached))}; "
            "set rollout.ranks_per_engine so that it fills nodes, or divides one"
        )
    if rank >= first + tensor_parallel or rank != first + serving.index(nodes[rank]):
        return None
    return Place(engine, reached, reached.index(nodes[rank]))


def check_places(ranks: int, ranks_per_node: int, ranks_per_engine: int, tensor_parallel: int) -> None:
    """Before anything starts: raises place_of's LayoutError for nodes that are filled one after the other."""
    nodes = [rank // ranks_per_node for rank in range(ranks)]
    for rank in range(0, ranks, ranks_per_engine):
        place_of(rank, nodes, ranks_per_engine, tensor_parallel)
