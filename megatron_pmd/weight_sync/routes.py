"""The way of weights from the ranks that hold them to every bucket that wants them: over nodes, then within.

Pure: no communication. A way is a tree. Each round doubles the nodes that have the weights, so the last of N
nodes has them after ⌈log2 N⌉ rounds, and no node receives them twice. A rank of the first node sends several
times; where all ranks are the first of as many bytes, each sends as much as it receives, (N - 1) / N of what
its node needs (recursive doubling: Thakur, Rabenseifner, Gropp 2005, section 4.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

WITHIN_NODE = 1000
"""Rounds from this one on stay within a node; those below cross nodes."""

Buckets = Mapping[int, Sequence[tuple[int, ...]]]
"""By node, for each bucket there that wants some weights: the ranks that can write into it."""


@dataclass(frozen=True)
class Hop:
    """One message of a way."""

    round: int
    source: int
    target: int


@dataclass(frozen=True, eq=False)
class Route:
    """One way, for all weights that the same ranks send to the same buckets."""

    roots: tuple[int, ...]
    """Ranks that read the weights of their own parameters: one on each node that has any, or a single one."""
    hops: tuple[Hop, ...]
    """In the order of their rounds."""

    @cached_property
    def of_rank(self) -> dict[int, list[Hop]]:
        """By rank, the hops that it sends or receives."""
        found: dict[int, list[Hop]] = defaultdict(list)
        for hop in self.hops:
            found[hop.source].append(hop)
            found[hop.target].append(hop)
        return dict(found)

    @cached_property
    def sends(self) -> dict[int, int]:
        """By root, its messages to other nodes."""
        across = [hop.source for hop in self.hops if hop.round < WITHIN_NODE]
        return {root: across.count(root) for root in self.roots}


def route(roots: tuple[int, ...], buckets: Buckets, nodes: Sequence[int]) -> Route:
    """The tree from these ranks to all of the buckets.

    roots    one rank at most on each node; the first counts as the tree's first
    nodes    by rank, its node
    Of a node without a root the rank enters whose place among those that could is the first root's own on
    its node: so the network cards of all ranks get their share, and each message stays between equal ones.
    """
    home = nodes[roots[0]]
    place = [rank for rank, node in enumerate(nodes) if node == home].index(roots[0])
    order = sorted(set(nodes))
    distance = {node: (i - order.index(home)) % len(order) for i, node in enumerate(order)}
    entries = {nodes[root]: root for root in roots}
    without: list[int] = []
    for node in sorted(buckets.keys() - entries.keys(), key=distance.__getitem__):
        able = [rank for ranks in buckets[node] for rank in ranks]
        entries[node] = able[place % len(able)]
        without.append(entries[node])
    return Route(roots, (*_doubling(list(roots), without), *_within(entries, buckets, place)))


def _doubling(having: list[int], without: list[int]) -> list[Hop]:
    """Each that has the weights sends them to one that has not, until all have."""
    hops: list[Hop] = []
    number = 0
    while without:
        pairs = list(zip(having, without, strict=False))
        hops += [Hop(number, source, target) for source, target in pairs]
        having += [target for _, target in pairs]
        without = without[len(pairs) :]
        number += 1
    return hops


def _within(entries: Mapping[int, int], buckets: Buckets, place: int) -> list[Hop]:
    """From the rank of each node that has the weights to the node's other buckets, one a round."""
    hops = []
    for node, wanting in buckets.items():
        entry, others = entries[node], [ranks for ranks in wanting if entries[node] not in ranks]
        first = next((i for i, ranks in enumerate(wanting) if entry in ranks), place)
        for ranks in others:
            # the next neighbour first: in no round do two of the node's ranks send to the same one
            turn = (wanting.index(ranks) - first) % len(wanting)
            hops.append(Hop(WITHIN_NODE + turn, entry, ranks[place % len(ranks)]))
    return sorted(hops, key=lambda hop: hop.round)
