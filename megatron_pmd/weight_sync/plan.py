"""Who reads, sends and writes which weights for which bucket: made once, the same on all ranks.

Pure: no communication, no Megatron. The sizes of a run do not change, so neither does its plan.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_pmd.errors import ModelError
from megatron_pmd.fp8 import SCALE_SUFFIX
from megatron_pmd.weight_sync.bucket_layout import BucketLayout, Entry, nbytes_of, padded
from megatron_pmd.weight_sync.readers import Readers, share_of
from megatron_pmd.weight_sync.routes import Buckets, Route, route

WANTED_BUCKETS = 8
"""A small model is cut into about so many, so that engines load one while the next is written."""
PIECE_BYTES = 2**27
"""A longer message goes in pieces, one after the other: so much of it is held at a time, or one region."""


@dataclass(frozen=True)
class Region:
    """A part of a Hugging Face tensor: `length` rows (dim 0) or columns (dim 1) from `start`."""

    name: str
    dtype: str
    """torch's name without the prefix."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dim: int
    start: int
    length: int

    @classmethod
    def whole(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Region:
        return cls(name, dtype, shape, 0, 0, shape[0] if shape else 1)

    @property
    def nbytes(self) -> int:
        extent = self.shape[self.dim] if self.shape else 1
        return nbytes_of(self.dtype, self.shape) // max(extent, 1) * self.length

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part alone."""
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :]) if self.shape else ()


def message_bytes(regions: Iterable[Region]) -> int:
    """Size of a message of these regions, each padded so that it can be read where it lies."""
    return sum(padded(region.nbytes) for region in regions)


def _pieces(regions: list[Region]) -> Iterator[list[Region]]:
    """The regions of a message in stretches of PIECE_BYTES at most, or of one region."""
    piece: list[Region] = []
    nbytes = 0
    for region in regions:
        if piece and nbytes + padded(region.nbytes) > PIECE_BYTES:
            yield piece
            piece, nbytes = [], 0
        piece.append(region)
        nbytes += padded(region.nbytes)
    yield piece


@dataclass
class RankPart:
    """What one rank does for a bucket."""

    reads: list[Region] = field(default_factory=list)
    """Of its own parameters, once each; of a matrix in FP8 the scales right after the values."""
    counted: set[Region] = field(default_factory=set)
    """Those of them whose words it adds up: each region's, on one rank of all."""
    rounds: dict[tuple[int, int], Round] = field(default_factory=dict)
    """In order, by the plan's round and the piece of its messages."""


@dataclass
class Round:
    """One exchange of messages, by the other rank."""

    outgoing: dict[int, list[Region]] = field(default_factory=lambda: defaultdict(list))
    incoming: dict[int, list[Region]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class BucketPlan:
    layouts: list[BucketLayout]
    """By kind of bucket (Plan.kinds)."""
    words: dict[str, int] = field(default_factory=dict)
    """By tensor, the size in bytes of the words that its checksum adds up; the order of the checksums."""
    ways: dict[Route, list[Region]] = field(default_factory=lambda: defaultdict(list))

    @property
    def nbytes(self) -> int:
        """Of the fullest bucket's tensors, without the gaps between them."""
        return max(sum(entry.nbytes for entry in layout.entries.values()) for layout in self.layouts)

    def of_rank(self, rank: int) -> RankPart:
        """Both ends of a message list its regions in the same order: that of `ways`."""
        part = RankPart()
        whole: dict[int, Round] = defaultdict(Round)
        for way, regions in self.ways.items():
            if rank in way.roots:
                part.reads += regions
            if rank == way.roots[0]:
                part.counted.update(regions)
            for hop in way.of_rank.get(rank, ()):
                side = whole[hop.round].outgoing if hop.source == rank else whole[hop.round].incoming
                side[hop.target if hop.source == rank else hop.source] += regions
        rounds: dict[tuple[int, int], Round] = defaultdict(Round)
        for number, both in whole.items():
            for other, regions in both.outgoing.items():
                for turn, piece in enumerate(_pieces(regions)):
                    rounds[number, turn].outgoing[other] = piece
            for other, regions in both.incoming.items():
                for turn, piece in enumerate(_pieces(regions)):
                    rounds[number, turn].incoming[other] = piece
        part.rounds = dict(sorted(rounds.items()))
        return part


@dataclass(frozen=True)
class Plan:
    capacity: int
    """Bytes of each of a reader's two buckets."""
    buckets: list[BucketPlan]
    kinds: dict[int, int]
    """By the rank that owns a bucket, which layout it has: buckets of one kind hold the same."""
    tensors: int
    bytes: int
    experts: int
    """Of a layer."""

    def manifest(self, kind: int) -> list[list[object]]:
        """[name, dtype, shape] of every tensor: what a reader of such buckets has been given by the end."""
        return [
            [entry.name, entry.dtype, list(entry.shape)]
            for bucket in self.buckets
            for entry in bucket.layouts[kind].entries.values()
        ]


def make_plan(
    held: Sequence[Sequence[Region]], readers: Readers, *, capacity: int, last: Sequence[str] = ()
) -> Plan:
    """Share out reading, sending and writing of all tensors.

    held      by rank, the regions it holds
    capacity  largest size of a bucket in bytes; a larger tensor makes the buckets as large as itself
    last      names that come at the end, in this order
    Raises ModelError naming a tensor whose regions do not make it up, or that ranks describe differently.
    """
    holders: dict[Region, list[int]] = defaultdict(list)
    for rank, regions in enumerate(held):
        for region in regions:
            holders[region].append(rank)
    by_name: dict[str, list[Region]] = defaultdict(list)
    for region in holders:
        by_name[region.name].append(region)
    for name, regions in by_name.items():
        _check_covered(name, regions)
    behind = set(last)
    first = {name: regions for name, regions in by_name.items() if name not in behind}
    names = [*_interleaved(first, holders), *last]
    tensors = {name: (by_name[name][0].dtype, by_name[name][0].shape) for name in names}
    numbers = {name: expert_of(name) for name in names}
    experts = 1 + max((n for n in numbers.values() if n is not None), default=-1)
    kinds_of = {n: readers.kinds_of(n, experts) for n in set(numbers.values())}
    wanting = {name: kinds_of[number] for name, number in numbers.items()}
    layouts = lay_out(tensors, capacity, wanting, len(readers.kinds))
    turns = _Turns(readers)
    buckets = [BucketPlan(of_kinds) for of_kinds in layouts]
    bucket_of = {name: bucket for bucket in buckets for layout in bucket.layouts for name in layout.entries}
    for name in names:
        bucket = bucket_of[name]
        bucket.words[name] = word_bytes(by_name[name])
        for region in by_name[name]:
            bucket.ways[turns.way(region, holders[region], wanting[name])].append(region)
    return Plan(
        capacity=max(layout.capacity for layout in layouts[0]),
        buckets=buckets,
        kinds={owner: readers.kinds.index(shares) for owner, shares in readers.shares.items()},
        tensors=len(tensors),
        bytes=sum(nbytes_of(*tensor) for tensor in tensors.values()),
        experts=experts,
    )


class _Turns:
    """Which of the ranks that hold a region send it: the one that has the least to send so far."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._bytes = [0] * len(readers.nodes)
        self._buckets: dict[tuple[int, ...], Buckets] = {}
        self._routes: dict[tuple[tuple[int, ...], tuple[int, ...]], Route] = {}
        self._name = ""
        self._group: tuple[str, dict[tuple[int, ...], tuple[int, ...]]] = ("", {})

    def way(self, region: Region, holders: list[int], kinds: tuple[int, ...]) -> Route:
        """Regions that are read together go one way: a matrix in FP8 is quantised with its scales."""
        if self._name != region.name:
            self._name, group = region.name, fused(region.name)
            if self._group[0] != group:
                self._group = (group, {})
        chosen = self._group[1]
        if kinds not in self._buckets:
            self._buckets[kinds] = self._readers.buckets(kinds)
        if tuple(holders) not in chosen:
            chosen[tuple(holders)] = self._roots(holders, self._buckets[kinds])
        key = (chosen[tuple(holders)], kinds)
        if key not in self._routes:
            self._routes[key] = route(key[0], self._buckets[kinds], self._readers.nodes)
        way = self._routes[key]
        for root, sends in way.sends.items():
            self._bytes[root] += region.nbytes * (1 + sends)
        return way

    def _roots(self, holders: list[int], buckets: Buckets) -> tuple[int, ...]:
        if len(holders) == 1:
            return (holders[0],)
        by_node: dict[int, list[int]] = defaultdict(list)
        for rank in holders:
            by_node[self._readers.nodes[rank]].append(rank)
        there = [
            min(ranks, key=self._bytes.__getitem__) for node, ranks in by_node.items() if node in buckets
        ]
        return tuple(
            sorted(there or [min(holders, key=self._bytes.__getitem__)], key=self._bytes.__getitem__)
        )


def _interleaved(tensors: Mapping[str, Sequence[Region]], holders: Mapping[Region, list[int]]) -> list[str]:
    """All names in such an order that each stretch of it has the same share of what any ranks hold.

    In the order of the layers, the few ranks of one pipeline stage would feed all nodes at a time.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(tensors, key=_natural):
        groups[fused(name)].append(name)
    queues: dict[tuple[tuple[int, ...], ...], list[tuple[int, list[str]]]] = defaultdict(list)
    for names in groups.values():
        regions = [region for name in names for region in tensors[name]]
        held_by = tuple(sorted({tuple(holders[region]) for region in regions}))
        queues[held_by].append((sum(region.nbytes for region in regions), names))
    placed: list[tuple[float, int, list[str]]] = []
    for queue in queues.values():
        total, behind = sum(size for size, _ in queue), 0
        for size, names in queue:
            placed.append(((behind + size / 2) / max(total, 1), len(placed), names))
            behind += size
    return [name for _, _, names in sorted(placed) for name in names]


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    capacity: int,
    wanting: Mapping[str, Sequence[int]] | None = None,
    kinds: int = 1,
) -> list[list[BucketLayout]]:
    """Buckets of one size, filled in the order of the names; of each, the layout by kind.

    tensors   name -> (dtype, shape)
    wanting   by name, the kinds of buckets that it lies in; None: all
    Tensors that an engine only takes together (`fused`) share a bucket.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[fused(name)].append(name)
    everywhere = tuple(range(kinds))
    kinds_of = wanting or dict.fromkeys(tensors, everywhere)
    sizes = {
        group: sum(padded(nbytes_of(*tensors[name])) for name in names) for group, names in groups.items()
    }
    totals = [0] * kinds
    for group, names in groups.items():
        for kind in kinds_of[names[0]]:
            totals[kind] += sizes[group]
    # neither less than the largest tensor, nor more than asked for, nor more than gives WANTED_BUCKETS
    size = max(max(sizes.values()), min(capacity, padded(-(-max(totals) // WANTED_BUCKETS))))
    buckets = [[BucketLayout(size) for _ in everywhere]]
    for group, names in groups.items():
        if any(buckets[-1][kind].used + sizes[group] > size for kind in kinds_of[names[0]]):
            buckets.append([BucketLayout(size) for _ in everywhere])
        for name in names:
            for kind in kinds_of[name]:
                buckets[-1][kind].add(name, *tensors[name])
    return buckets


def expert_of(name: str) -> int | None:
    """Which of its layer's experts a tensor belongs to; None for any other."""
    _, _, behind = name.partition(".experts.")
    number, _, _ = behind.partition(".")
    return int(number) if number.isdigit() else None


def sent_by_each(bucket: BucketPlan, kinds: Sequence[int], experts: int) -> list[list[Entry]]:
    """What each of the senders to a machine sends: its share of the experts, and the first one all else.

    kinds: of the buckets that they send it from.
    """
    return [
        [
            entry for name, entry in bucket.layouts[kind].entries.items()
            if share_of(expert_of(name), experts, len(kinds)) == number
        ]
        for number, kind in enumerate(kinds)
    ]  # fmt: skip


def fused(name: str) -> str:
    """Names with the same answer must reach an engine in one call.

    SGLang's DeepSeek models keep the first of the two down-projections of latent attention in a variable of
    that one call, to fuse it with the second: sent apart, both are lost without a word. A matrix in FP8 and
    its scales stay together too: one is computed with the other.
    """
    for part in (".q_a_proj.", ".kv_a_proj_with_mqa."):
        name = name.replace(part, ".fused_qkv_a_proj.")
    return name.removesuffix(SCALE_SUFFIX)


def word_bytes(regions: Iterable[Region]) -> int:
    """Size of the largest word, 1 to 8 bytes, that no edge of these regions of one tensor cuts."""
    word = 8
    for region in regions:
        item, last = nbytes_of(region.dtype, ()), len(region.shape) - 1
        if region.dim == last:
            word = math.gcd(word, item * region.start, item * region.length)
        else:
            word = math.gcd(word, item * (region.shape[last] if region.shape else 1))
    return word


def _check_covered(name: str, regions: list[Region]) -> None:
    first = regions[0]
    if len(regions) == 1 and first.local_shape == first.shape:
        return
    for region in regions:
        if (region.dtype, region.shape, region.dim) != (first.dtype, first.shape, first.dim):
            raise ModelError(
                f"tensor {name} is {first.dtype} {list(first.shape)}, split along {first.dim}, on one rank "
                f"and {region.dtype} {list(region.shape)}, split along {region.dim}, on another"
            )
    at = 0
    for region in sorted(regions, key=lambda r: r.start):
        if region.start != at:
            break
        at += region.length
    if at != (first.shape[first.dim] if first.shape else 1):
        raise ModelError(
            f"tensor {name} of shape {list(first.shape)}: the ranks' parts of dimension {first.dim} do not "
            f"make it up: {sorted((r.start, r.start + r.length) for r in regions)}"
        )


def _natural(name: str) -> str:
    """Sorts layer 10 after layer 9."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
