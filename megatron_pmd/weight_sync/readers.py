"""Which buckets of weights there are, who can write into each, and what engines read of it.

Pure: no communication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_pmd.weight_sync.routes import Buckets

Share = tuple[int, int]
"""(i, n): of n equal shares of every layer's experts the i-th; (0, 1) are all."""
ALL_EXPERTS: Share = (0, 1)


def share_of(expert: int | None, experts: int, shares: int) -> int:
    """Which of so many shares one of so many experts is in; what is no expert counts to the first."""
    return 0 if expert is None else expert * shares // experts


@dataclass(frozen=True)
class Readers:
    """Which buckets there are, who writes into them, and which experts are read of each."""

    nodes: Sequence[int]
    """By rank, its node."""
    owners: Sequence[int | None]
    """By rank, the rank that owns the bucket it can write into; None where none is needed."""
    shares: Mapping[int, frozenset[Share]]
    """By owner of a bucket: the experts that engines read of it."""

    @cached_property
    def kinds(self) -> list[frozenset[Share]]:
        return sorted(set(self.shares.values()), key=sorted)

    def kind_with(self, share: Share) -> int:
        """Of buckets that want these experts."""
        return next(number for number, shares in enumerate(self.kinds) if share in shares)

    def kinds_of(self, expert: int | None, experts: int) -> tuple[int, ...]:
        """The kinds of buckets that want this one of so many experts, or (None) what every reader wants."""
        return tuple(
            number
            for number, shares in enumerate(self.kinds)
            if expert is None or any(share_of(expert, experts, of) == share for share, of in shares)
        )

    def buckets(self, kinds: Collection[int]) -> Buckets:
        """Of these kinds."""
        wanted = {owner for owner, shares in self.shares.items() if self.kinds.index(shares) in kinds}
        writers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, owner in enumerate(self.owners):
            if owner in wanted:
                writers[self.nodes[rank]][owner].append(rank)
        return {node: [tuple(ranks) for ranks in owners.values()] for node, owners in writers.items()}


def readers_of(
    nodes: Sequence[int], serves: Sequence[Sequence[int]], *, on_device: bool, expert_parallel: int = 1
) -> Readers:
    """The buckets that engines open: one on each of their nodes, or on each of their devices.

    nodes            by rank, its node
    serves           by rank, the ranks that share their devices with the engine that it leads, in the order
                     of the engine's ranks; a bucket on a node belongs to the node's first rank
    expert_parallel  into how many equal shares each engine's ranks divide a layer's experts, in the order of
                     the ranks (SGLang: parallel_state.py, initialize_model_parallel; FusedMoE's
                     _map_global_expert_id_to_local_expert_id)
    """
    shares: dict[int, set[Share]] = defaultdict(set)
    for ranks in serves:
        for position, rank in enumerate(ranks):
            owner = rank if on_device else nodes.index(nodes[rank])
            shares[owner].add((position * expert_parallel // len(ranks), expert_parallel))
    owners = [rank if on_device else nodes.index(node) for rank, node in enumerate(nodes)]
    return Readers(
        nodes, [owner if owner in shares else None for owner in owners],
        {owner: frozenset(found) for owner, found in shares.items()},
    )  # fmt: skip


def senders_readers(
    nodes: Sequence[int], serves: Sequence[Sequence[int]], *, on_device: bool
) -> tuple[Readers, list[int]]:
    """The buckets of the ranks that send to engines elsewhere; and the kinds of them, by share.

    The senders to a machine share out the experts. Where they are more than elsewhere, some have none.
    serves: by rank, the senders of which it is the first.
    """
    sharing = min(len(ranks) for ranks in serves if ranks)
    sending = [ranks[:sharing] for ranks in serves]
    readers = readers_of(nodes, sending, on_device=on_device, expert_parallel=sharing)
    return readers, [readers.kind_with((share, sharing)) for share in range(sharing)]


def only_the_driver(nodes: Sequence[int], *, on_device: bool) -> Readers:
    """One bucket, which the driver passes on: rank 0's, or its node's."""
    owners = [
        0 if rank == 0 or (not on_device and node == nodes[0]) else None for rank, node in enumerate(nodes)
    ]
    return Readers(nodes, owners, {0: frozenset([ALL_EXPERTS])})
