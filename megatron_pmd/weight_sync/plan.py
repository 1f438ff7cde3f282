"""Which rank writes what into which bucket: made once from what every rank holds, the same on all ranks.

Pure: no communication, no Megatron. The sizes of a run do not change, so neither does its plan.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_pmd.errors import ModelError
from megatron_pmd.fp8 import SCALE_SUFFIX
from megatron_pmd.weight_sync.bucket_layout import BucketLayout, nbytes_of, padded

WANTED_BUCKETS = 8
"""A small model is cut into about so many, so that engines load one while the next is written."""


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


@dataclass(frozen=True)
class Move:
    """A region that nobody on the target's node holds."""

    region: Region
    source: int
    """Rank that sends it."""
    target: int
    """Rank that receives it and writes it into its node's bucket."""


@dataclass
class BucketPlan:
    layout: BucketLayout
    words: dict[str, int] = field(default_factory=dict)
    """By tensor, the size in bytes of the words that its checksum adds up."""
    writes: dict[int, list[Region]] = field(default_factory=lambda: defaultdict(list))
    """By rank: what it copies from its own weights into its node's bucket."""
    moves: list[Move] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of its tensors, without the gaps between them."""
        return sum(entry.nbytes for entry in self.layout.entries.values())


@dataclass(frozen=True)
class Plan:
    capacity: int
    """Bytes of each of the two buckets."""
    buckets: list[BucketPlan]
    tensors: int
    bytes: int

    @property
    def manifest(self) -> list[list[object]]:
        """[name, dtype, shape] of every tensor: what an engine must have been given by the end."""
        return [
            [entry.name, entry.dtype, list(entry.shape)]
            for bucket in self.buckets
            for entry in bucket.layout.entries.values()
        ]


def make_plan(
    held: Sequence[Sequence[Region]],
    nodes: Sequence[int],
    *,
    targets: Collection[int],
    capacity: int,
    last: Sequence[str] = (),
) -> Plan:
    """Share out the writing of all tensors.

    held      by rank, the regions it holds
    nodes     by rank, its node
    targets   nodes that need every tensor, because engines there read it
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
    names = [*sorted((n for n in by_name if n not in behind), key=_natural), *last]
    tensors = {name: (by_name[name][0].dtype, by_name[name][0].shape) for name in names}
    layouts = lay_out(tensors, capacity)
    share = _Shares(nodes, targets)
    buckets = [BucketPlan(layout) for layout in layouts]
    for bucket in buckets:
        for name in bucket.layout.entries:
            bucket.words[name] = word_bytes(by_name[name])
            for region in by_name[name]:
                share.out(region, holders[region], bucket)
    return Plan(
        capacity=max(layout.capacity for layout in layouts),
        buckets=buckets,
        tensors=len(tensors),
        bytes=sum(nbytes_of(*tensor) for tensor in tensors.values()),
    )


class _Shares:
    """Gives every region, on every node that needs it, to the rank that has the least to do so far."""

    def __init__(self, nodes: Sequence[int], targets: Collection[int]) -> None:
        self._nodes = nodes
        self._ranks = {node: [r for r, n in enumerate(nodes) if n == node] for node in sorted(targets)}
        self._bytes = [0] * len(nodes)

    def out(self, region: Region, holders: list[int], bucket: BucketPlan) -> None:
        for node, ranks in self._ranks.items():
            local = [rank for rank in holders if self._nodes[rank] == node]
            writer = min(local or ranks, key=self._bytes.__getitem__)
            self._bytes[writer] += region.nbytes
            if local:
                bucket.writes[writer].append(region)
                continue
            source = min(holders, key=self._bytes.__getitem__)
            self._bytes[source] += region.nbytes
            bucket.moves.append(Move(region, source, writer))


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]], capacity: int) -> list[BucketLayout]:
    """Buckets of one size, filled in the order of the names; name -> (dtype, shape).

    Tensors that an engine only takes together (`fused`) share a bucket.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[fused(name)].append(name)
    sizes = {
        group: sum(padded(nbytes_of(*tensors[name])) for name in names) for group, names in groups.items()
    }
    share = padded(-(-sum(sizes.values()) // WANTED_BUCKETS))
    # neither less than the largest tensor, nor more than asked for, nor more than gives WANTED_BUCKETS
    size = max(max(sizes.values()), min(capacity, share))
    layouts = [BucketLayout(size)]
    for group, names in groups.items():
        if layouts[-1].used + sizes[group] > size:
            layouts.append(BucketLayout(size))
        for name in names:
            layouts[-1].add(name, *tensors[name])
    return layouts


def fused(name: str) -> str:
    """Names with the same answer must reach an engine in one call.

    SGLang's DeepSeek models keep the first of the two down-projections of latent attention in a variable of
    that one call, to fuse it with the second: sent apart, both are lost without a word. A matrix in FP8 and
    its scales stay together too: one is computed with the other.
    """
    return re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".fused_qkv_a_proj.", name).removesuffix(SCALE_SUFFIX)


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


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
