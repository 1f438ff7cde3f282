"""What a plan of a weight sync has each link carry, and for how long: see tools/sync_plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_pmd.weight_sync.plan import (
    PIECE_BYTES,
    BucketPlan,
    Plan,
    expert_of,
    message_bytes,
    sent_by_each,
)
from megatron_pmd.weight_sync.routes import WITHIN_NODE, Route


@dataclass(frozen=True)
class Links:
    """Assumed speeds: data sheets, and orders of magnitude where there are none."""

    card_bytes_per_second: float = 50e9
    """One 400 Gb/s network card for each GPU, each direction."""
    nvlink_bytes_per_second: float = 450e9
    """Of one H100 within its node, each direction (900 GB/s in both)."""
    memory_bytes_per_second: float = 3.35e12
    round_seconds: float = 50e-6
    """Start and end of one exchange of messages, whatever their size."""
    tensor_seconds: float = 60e-6
    """The host's part in one tensor, in rank or engine: views, starts of kernels, SGLang's loader."""
    passed_over_seconds: float = 19e-6
    """SGLang's loader with a tensor of another rank's expert: at most as with one that it copies."""
    bucket_seconds: float = 20e-3
    """One request to the engines, from the rank to all of their processes and back."""


@dataclass
class Traffic:
    """Of a whole sync. Arrays are by rank."""

    across_out: npt.NDArray[np.int64]
    """Bytes that its network card sends."""
    across_in: npt.NDArray[np.int64]
    within_out: npt.NDArray[np.int64]
    """Bytes that it sends over NVLink."""
    within_in: npt.NDArray[np.int64]
    messages: npt.NDArray[np.int64]
    """That it sends."""
    reads: npt.NDArray[np.int64]
    """Bytes of its own parameters that it reads, in the form that they leave in."""
    staging: int
    """Most bytes that a rank holds at one time beside its buckets, or more."""
    rounds: int
    """In which anything crosses nodes, pieces of long messages counted one by one."""
    across_seconds: float
    """Each round as long as the card that has most to carry, one after the other."""
    within_seconds: float
    loads: int
    """Tensors that the engine's rank with most of them loads."""


def traffic(plan: Plan, ranks: int, links: Links) -> Traffic:
    """Send every message of the plan, and count."""
    zeros = lambda: np.zeros(ranks, np.int64)  # noqa: E731
    found = Traffic(zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), 0, 0, 0.0, 0.0, 0)
    hops: dict[Route, npt.NDArray[np.int64]] = {}
    for bucket in plan.buckets:
        _count(plan, bucket, hops, found, links)
    kinds = range(len(plan.buckets[0].layouts))
    found.loads = max(sum(len(bucket.layouts[kind].entries) for bucket in plan.buckets) for kind in kinds)
    return found


def _count(
    plan: Plan, bucket: BucketPlan, hops: dict[Route, npt.NDArray[np.int64]], found: Traffic, links: Links
) -> None:
    ranks = len(found.reads)
    rows, sizes, kept = [], [], np.zeros(ranks, np.int64)
    for way, regions in bucket.ways.items():
        size = message_bytes(regions)
        if way not in hops:
            hops[way] = np.array([(h.round, h.source, h.target) for h in way.hops], np.int64).reshape(-1, 3)
        rows.append(hops[way])
        sizes.append(np.full(len(hops[way]), size))
        found.reads[list(way.roots)] += size
        for root in way.roots:
            kind = plan.kinds.get(root)
            if kind is None or regions[0].name not in bucket.layouts[kind].entries:
                kept[root] += size  # what a rank's own bucket holds is sent on from there
    every, size_of = np.concatenate(rows), np.concatenate(sizes)
    largest = max(region.nbytes for regions in bucket.ways.values() for region in regions)
    for number in np.unique(every[:, 0]):
        now = every[:, 0] == number
        pairs, place = np.unique(every[now, 1] * ranks + every[now, 2], return_inverse=True)
        nbytes = np.bincount(place, size_of[now])
        sources, targets, pieces = pairs // ranks, pairs % ranks, -(-nbytes // PIECE_BYTES)
        out, came = (np.bincount(ends, nbytes, ranks).astype(np.int64) for ends in (sources, targets))
        found.messages += np.bincount(sources, pieces, ranks).astype(np.int64)
        at_a_time = np.minimum(nbytes, max(PIECE_BYTES, largest))
        staged = np.bincount(sources, at_a_time, ranks) + np.bincount(targets, at_a_time, ranks)
        found.staging = max(found.staging, int((kept + staged).max()))
        busiest, waits = int(max(out.max(), came.max())), int(pieces.max()) * links.round_seconds
        if number < WITHIN_NODE:
            found.across_out += out
            found.across_in += came
            found.rounds += int(pieces.max())
            found.across_seconds += busiest / links.card_bytes_per_second + waits
        else:
            found.within_out += out
            found.within_in += came
            found.within_seconds += busiest / links.nvlink_bytes_per_second + waits


@dataclass(frozen=True)
class LastHop:
    """From the ranks to engines elsewhere: a sender's part of a bucket is one broadcast to all of a machine.

    NCCL makes chains of its members: each link has every byte once, and the links between two nodes are as
    many as the cards of the ranks there, with equal shares.
    """

    out: npt.NDArray[np.int64]
    """By rank, bytes that its card sends."""
    within_out: npt.NDArray[np.int64]
    """By rank, bytes that it sends over NVLink."""
    into: npt.NDArray[np.int64]
    """By machine, bytes that its cards receive."""
    messages: int
    """That a machine takes."""
    chain: int
    """Links of the longest, from the rank that sends to the last engine."""
    seconds: float
    """Of all messages to the machine that takes longest."""
    loads: int
    """Tensors that an engine's rank loads."""
    passed_over: int
    """Those of other ranks' experts, which it is given, too."""


def last_hop(
    plan: Plan,
    kinds: Sequence[int],
    machines: Sequence[Sequence[int]],
    engine_ranks: int,
    expert_parallel: int,
    links: Links,
) -> LastHop:
    """Send every bucket to every machine with engines, and count.

    kinds            of the senders' buckets
    machines         by machine, the ranks that send there
    engine_ranks     on each of them
    expert_parallel  into how many shares an engine's ranks divide a layer's experts
    """
    ranks = 1 + max(max(senders) for senders in machines)
    out, within, into = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), list[int]()
    slowest, chain = 0.0, 0
    shares = [share for bucket in plan.buckets for share in sent_by_each(bucket, kinds, plan.experts)]
    sizes = [sum(entry.nbytes for entry in entries) for entries in shares if entries]
    for senders in machines:
        cards, took = min(len(senders), engine_ranks), 0.0
        for size in sizes:
            out[list(senders[:cards])] += size // cards
            within[list(senders)] += size * (len(senders) - 1) // len(senders)
            took += size / (cards * links.card_bytes_per_second) + links.round_seconds
        into.append(sum(sizes))
        slowest, chain = max(slowest, took), max(chain, len(senders) + engine_ranks - 1)
    of_experts = sum(expert_of(entry.name) is not None for entries in shares for entry in entries)
    others = of_experts - of_experts // expert_parallel
    return LastHop(out, within, np.array(into), len(sizes), chain, slowest, plan.tensors - others, others)


def longest_path(plan: Plan) -> int:
    """Messages one after the other by which any tensor comes into the last bucket that wants it."""
    longest = 0
    for way in {way for bucket in plan.buckets for way in bucket.ways}:
        depth = dict.fromkeys(way.roots, 0)
        for hop in way.hops:
            depth[hop.target] = depth[hop.source] + 1
        longest = max(longest, *depth.values())
    return longest


@dataclass(frozen=True)
class Seconds:
    """Of a sync, computed: writing a bucket and loading the one before go on at the same time."""

    write: float
    load: float
    cards: float
    """In which the busiest card sends what it has to, for both."""

    @property
    def total(self) -> float:
        """The slowest, and one bucket's worth of the quicker one of writing and loading at the ends."""
        return max(self.write, self.load, self.cards) + min(self.write, self.load) / 8


def seconds(plan: Plan, counted: Traffic, links: Links, hop: LastHop | None = None) -> Seconds:
    """Writing: what every round takes, the rank's own reading (twice as wide before it is FP8), and three
    passes over what it packs and unpacks. Loading: a pass for the checksums and two for the copy; of all that
    comes by the last hop to engines elsewhere, as many.
    """
    own, bytes_each = int(counted.reads.max()), max(_bytes_of_kinds(plan))
    through = int((counted.across_in + counted.within_in + counted.across_out + counted.within_out).max())
    device = (3 * own + 3 * through) / links.memory_bytes_per_second
    write = counted.across_seconds + counted.within_seconds + device + counted.loads * links.tensor_seconds
    if hop is None:
        loading = 3 * bytes_each / links.memory_bytes_per_second + counted.loads * links.tensor_seconds
        sent = counted.across_out
        return Seconds(write, loading + len(plan.buckets) * links.bucket_seconds, _of_card(sent, links))
    loading = hop.seconds + 3 * plan.bytes / links.memory_bytes_per_second
    host = hop.loads * links.tensor_seconds + hop.passed_over * links.passed_over_seconds
    sent = counted.across_out + hop.out
    return Seconds(write, loading + host + hop.messages * links.bucket_seconds, _of_card(sent, links))


def _of_card(sent: npt.NDArray[np.int64], links: Links) -> float:
    return int(sent.max()) / links.card_bytes_per_second


def _bytes_of_kinds(plan: Plan) -> list[int]:
    return [
        sum(entry.nbytes for bucket in plan.buckets for entry in bucket.layouts[kind].entries.values())
        for kind in range(len(plan.buckets[0].layouts))
    ]
