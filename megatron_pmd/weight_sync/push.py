"""From the actor's shards to the engines, in buckets: the next is filled while one is loaded."""

from __future__ import annotations

import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_pmd.device import current_device
from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.bucket import Bucket, SharedBucket, path_of, sweep
from megatron_pmd.weight_sync.bucket_layout import word_sum
from megatron_pmd.weight_sync.device_bucket import DeviceBucket
from megatron_pmd.weight_sync.plan import BucketPlan, Move, Plan, Region, make_plan

if TYPE_CHECKING:  # importing Megatron takes seconds, and the launcher needs only shared_memory_key
    from megatron_pmd.distributed import Control
    from megatron_pmd.observe.subphases import SubphaseClock
    from megatron_pmd.weight_sync.shards import ShardExport
    from megatron_pmd.weight_sync.transport import Transport

Sums = dict[str, int]
"""By tensor, the sum of the words that one rank has written of it."""


@dataclass
class PushReport:
    """What one update moved."""

    tensors: int = 0
    bytes: int = 0
    buckets: int = 0


class WeightPush:
    """Two buckets on every node that needs them, or on each of its devices; all ranks of the node write them.

    At one point a bucket is full and its predecessor has been loaded; from there on engines load it, and the
    ranks write the next into the predecessor's memory.
    """

    def __init__(
        self,
        transport: Transport,
        control: Control,
        run_key: str,
        clock: SubphaseClock,
        *,
        bucket_bytes: int,
        verify: bool = False,
        on_device: bool = False,
    ) -> None:
        """clock: measures `begin` (engines withdraw their version), `write` (shards go into buckets), `load`
        (what is then left to wait for the engines), `verify` and `confirm`.
        bucket_bytes: largest size of a bucket. verify: load everything twice, and compare (loader.py).
        on_device: the buckets are DeviceBucket, else SharedBucket.
        """
        self.transport, self._control, self.run_key = transport, control, run_key
        self._clock, self._bucket_bytes, self._verify = clock, bucket_bytes, verify
        self._on_device, self._node_group = on_device, None
        self._export: ShardExport | None = None
        self._plan: Plan | None = None
        self._buckets: list[Bucket] = []
        self._handles: list[list[list[Any]]] = []
        """By rank, how its device's buckets are opened; of those that share it with an engine's rank."""
        self._updates = itertools.count()
        self._token = secrets.token_hex(4)
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")

    def push(self, export: ShardExport, version: int, *, serves: Sequence[int]) -> PushReport:
        """Send every tensor to every engine and confirm the version.

        Collective; the weights' memory must be resident in actor and engines.
        serves: the ranks that share their devices with the engine that this rank leads, in the order of the
        engine's own ranks; none: it leads none.
        Raises EngineError for a bucket that an engine refuses, StaleWeights for a version that it does not
        confirm.
        """
        if export is not self._export:
            self._prepare(export, serves)
        assert self._plan is not None
        plan = self._plan
        if self._on_device and not self._handles:
            self._make_device_buckets()
        name = f"{version}#{next(self._updates)}-{self._token}"  # an engine never sees a name twice
        with self._clock("begin", memory=False):
            self._control.on_all(self.transport.begin)
            self.transport.connect()
        self._send(export, plan, {"name": name})
        if self._verify:
            self._send(export, plan, {"name": name, "verify": "next"})
        with self._clock("confirm"):
            self._control.on_all(lambda: self.transport.end(version))
        if self._on_device:
            self._close_buckets()
        return PushReport(plan.tensors, plan.bytes, len(plan.buckets))

    def _prepare(self, export: ShardExport, serves: Sequence[int]) -> None:
        """Make the plan and the buckets: sizes do not change while a run lasts."""
        control = self._control
        shares = control.all_gather((control.node, serves, export.regions))
        nodes = [node for node, _, _ in shares]
        self._serving = {rank for _, serves, _ in shares for rank in serves}
        serving = {nodes[rank] for rank in self._serving}
        targets = [n for n in sorted(set(nodes)) if self.transport.needs_buckets(n in serving, n)]
        self._plan = make_plan(
            [regions for _, _, regions in shares], nodes, targets=targets, capacity=self._bucket_bytes,
            last=[region.name for region in export.irregular],
        )  # fmt: skip
        self._nodes, self._serves, self._export = nodes, serves, export
        self._close_buckets()
        keys = [self._bucket_key(control.node, turn) for turn in range(min(2, len(self._plan.buckets)))]
        self._keys = keys if control.node in targets else []
        if self._on_device:
            of_nodes = [[rank for rank, n in enumerate(nodes) if n == node] for node in sorted(set(nodes))]
            self._node_group = self._node_group or dist.new_subgroups_by_enumeration(of_nodes)[0]
        else:
            self._make_shared_buckets(first=nodes.index(control.node) == control.rank)

    def _make_shared_buckets(self, *, first: bool) -> None:
        """first: whether this rank is its node's first, which owns the files."""

        def make(owner: bool) -> None:
            if owner == first and self._plan is not None:
                if owner:
                    sweep()
                self._buckets = [SharedBucket(key, self._plan.capacity, owner=owner) for key in self._keys]

        self._control.on_all(lambda: make(owner=True))
        self._control.on_all(lambda: make(owner=False))

    def _make_device_buckets(self) -> None:
        """Also says to all ranks how they are opened, by those who do."""
        assert self._plan is not None
        opened = self.transport.opens_buckets and self._control.rank in self._serving
        buckets = [DeviceBucket(key, self._plan.capacity, self._node_group) for key in self._keys]
        self._buckets = list(buckets)
        handles = [bucket.handle() for bucket in buckets] if opened else []
        self._handles = self._control.all_gather(handles)

    def _bucket_key(self, node: int, turn: int) -> str:
        return f"{self.run_key}-{node}-{turn}"

    def _places(self, turn: int) -> dict[str, Any]:
        """Where the engine that this rank leads finds the buckets of a turn: all hold the same."""
        if self._on_device:
            return {"handles": [self._handles[rank][turn] for rank in self._serves if self._handles[rank]]}
        nodes = dict.fromkeys(self._nodes[rank] for rank in self._serves)
        return {"paths": [str(path_of(self._bucket_key(node, turn))) for node in nodes]}

    def _send(self, export: ShardExport, plan: Plan, update: dict[str, Any]) -> None:
        """Every bucket, once; what of `update` depends on the position is added here."""
        loading: Future[None] | None = None

        def loaded(sums: Sums) -> Sums:
            """This rank's sums, once its engines have taken the bucket before."""
            if loading is not None:
                loading.result()
            return sums

        irregular = export.irregular_tensors()
        # sub-phases of a verification do not count as the update's own
        write, load = ("verify", "verify") if "verify" in update else ("write", "load")
        for number, bucket_plan in enumerate(plan.buckets):
            bucket = self._buckets[number % 2] if self._buckets else None
            first, last = number == 0, number == len(plan.buckets) - 1
            with self._clock(write, bucket_plan.nbytes, memory=first):
                sums = self._write(export, bucket_plan, bucket, irregular)
            with self._clock(load, memory=False):
                shares = self._control.on_all(partial(loaded, sums))
            description: dict[str, Any] = {"tensors": bucket_plan.layout.as_json()}
            if bucket is not None:
                parts = [part for rank, part in enumerate(shares) if self._is_here(rank)]
                checks = {
                    name: (word, sum(part.get(name, 0) for part in parts) % 2**64)
                    for name, word in bucket_plan.words.items()
                }
                description = bucket.description(checks, self._places(number % 2))
                description["update"] = _position(update, number, last, plan)
                description["ends"] = last and self._verify == ("verify" in update)
            loading = self._loader.submit(self.transport.load, bucket, description)
        with self._clock(load, plan.bytes):
            self._control.on_all(partial(loaded, {}))

    def _is_here(self, rank: int) -> bool:
        """Whether a rank shares this one's node."""
        return self._nodes[rank] == self._control.node

    def _write(
        self,
        export: ShardExport,
        plan: BucketPlan,
        bucket: Bucket | None,
        irregular: Iterator[tuple[str, torch.Tensor]],
    ) -> Sums:
        """This rank's share of a bucket; returns the sums of what it wrote."""
        whole = _take(irregular, {region.name for region in export.irregular} & plan.layout.entries.keys())

        def held(region: Region) -> torch.Tensor:
            return whole[region.name] if region.name in whole else export.shards[region].tensor()

        sums: Sums = defaultdict(int)

        def place(region: Region, source: torch.Tensor) -> None:
            assert bucket is not None
            target = bucket.tensor(plan.layout.entries[region.name])
            if region.shape:
                target = target.narrow(region.dim, region.start, region.length)
            target.view(source.shape).copy_(source)
            sums[region.name] += word_sum(source, plan.words[region.name])

        if bucket is not None:
            bucket.begin(plan.layout)
        with torch.no_grad():
            arriving = _exchange(plan.moves, self._control.rank, held)
            for region in plan.writes.get(self._control.rank, []):
                place(region, held(region))
            for region, tensor in arriving():
                place(region, tensor)
        if bucket is not None:
            bucket.complete()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be there before an engine is told of them
        return dict(sums)

    def close(self) -> None:
        """Give the buckets' memory back."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        self.transport.close()
        self._close_buckets()

    def _close_buckets(self) -> None:
        for bucket in self._buckets:
            bucket.close()
        self._buckets, self._handles = [], []


def _exchange(
    moves: list[Move], rank: int, held: Callable[[Region], torch.Tensor]
) -> Callable[[], Iterator[tuple[Region, torch.Tensor]]]:
    """Start what has to cross nodes, one message for each pair of ranks; the result yields what arrived."""
    outgoing: dict[int, list[Region]] = defaultdict(list)
    incoming: dict[int, list[Region]] = defaultdict(list)
    for move in moves:
        if move.source == rank:
            outgoing[move.target].append(move.region)
        if move.target == rank:
            incoming[move.source].append(move.region)
    operations, buffers = [], {}
    for target, regions in outgoing.items():
        data = torch.cat([held(r).reshape(-1).view(torch.uint8) for r in regions])
        operations.append(dist.P2POp(dist.isend, data, target))
    for source, regions in incoming.items():
        buffers[source] = torch.empty(
            sum(r.nbytes for r in regions), dtype=torch.uint8, device=current_device()
        )
        operations.append(dist.P2POp(dist.irecv, buffers[source], source))
    pending = dist.batch_isend_irecv(operations) if operations else []

    def arrived() -> Iterator[tuple[Region, torch.Tensor]]:
        for work in pending:
            work.wait()
        for source, regions in incoming.items():
            at = 0
            for region in regions:
                data = buffers[source][
                    at : at + region.nbytes
                ].clone()  # starts anywhere: the copy is aligned
                at += region.nbytes
                shape = list(region.shape)
                if shape:
                    shape[region.dim] = region.length
                yield region, data.view(getattr(torch, region.dtype)).view(shape)

    return arrived


def _take(stream: Iterator[tuple[str, torch.Tensor]], names: set[str]) -> dict[str, torch.Tensor]:
    """The next tensors of the stream, which must be these."""
    taken = {}
    for _ in range(len(names)):
        name, tensor = next(stream, ("", torch.empty(0)))
        if name not in names:
            raise ModelError(f"the export gave tensor {name or 'nothing'} where {min(names)} was due")
        taken[name] = tensor.detach()
    return taken


def _position(update: dict[str, Any], number: int, last: bool, plan: Plan) -> dict[str, Any]:
    """What the loader is told of a bucket's place in its update."""
    if "verify" in update:
        return update | {"verify": "next" if number else "first", "verify_last": last}
    return update | ({"manifest": plan.manifest} if last else {})
