"""From the actor's shards to the engines, in buckets: the next is filled while one is loaded."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_pmd.device import current_device
from megatron_pmd.errors import ModelError, PmdError
from megatron_pmd.weight_sync.bucket import Bucket, SharedBucket, path_of, sweep
from megatron_pmd.weight_sync.bucket_layout import word_sum
from megatron_pmd.weight_sync.device_bucket import DeviceBucket
from megatron_pmd.weight_sync.exchange import Exchange, packed, unpacked
from megatron_pmd.weight_sync.plan import (
    BucketPlan,
    Plan,
    RankPart,
    Region,
    make_plan,
    message_bytes,
    sent_by_each,
)
from megatron_pmd.weight_sync.readers import Readers, only_the_driver, readers_of, senders_readers

if TYPE_CHECKING:
    from megatron_pmd.distributed import Control
    from megatron_pmd.observe.subphases import SubphaseClock
    from megatron_pmd.weight_sync.shards import ShardExport
    from megatron_pmd.weight_sync.transport import Transport


@dataclass
class PushReport:
    """What one update moved."""

    tensors: int = 0
    bytes: int = 0
    buckets: int = 0


class WeightPush:
    """Two buckets on every node that needs them, or on each of its devices, filled as the plan says.

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
        timeout_seconds: float,
        verify: bool = False,
        on_device: bool = False,
        expert_parallel: int = 1,
    ) -> None:
        """clock: measures `begin` (engines withdraw their version), `write` (shards go into buckets), `load`
        (what is then left to wait for the engines), `verify` and `confirm`.
        bucket_bytes: largest size of a bucket. timeout_seconds: in which an engine has taken one.
        verify: load everything twice, and compare (loader.py). on_device: the buckets are DeviceBucket, else
        SharedBucket. expert_parallel: see readers_of.
        """
        self.transport, self._control, self.run_key = transport, control, run_key
        self._clock, self._bucket_bytes, self._verify = clock, bucket_bytes, verify
        self._on_device, self._expert_parallel = on_device, expert_parallel
        self._timeout_seconds = timeout_seconds
        self._exchange: Exchange | None = None
        self._export: ShardExport | None = None
        self._plan: Plan | None = None
        self._kinds: list[int] = []
        """Of the buckets of the senders to a machine, where they read them; by their shares of experts."""
        self._parts: list[RankPart] = []
        """By bucket, what this rank does for it."""
        self._buckets: list[Bucket] = []
        self._handles: list[list[list[Any]]] = []
        """By rank, how its device's buckets are opened; of those that share it with an engine's rank."""
        self._updates = itertools.count()
        self._token = secrets.token_hex(4)
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")

    def push(
        self,
        export: ShardExport,
        version: int,
        *,
        serves: Sequence[int],
        before_load: Callable[[], None] = lambda: None,
    ) -> PushReport:
        """Send every tensor to every engine and confirm the version.

        Collective; the weights' memory must be resident in the actor.
        serves: see Fleet.serves; the ranks that share their devices with an engine, in the order of the
        engine's own ranks.
        before_load: makes the engines ready to take weights, which are resident in them from then on. Called
        on every rank, once the first bucket is full: engines that generate do so until then.
        Raises EngineError for a bucket that an engine refuses, StaleWeights for a version that it does not
        confirm.
        """
        if export is not self._export:
            self._prepare(export, serves)
        assert self._plan is not None
        plan = self._plan
        if self._on_device and not self._handles:
            self._make_device_buckets()
        export.begin()
        name = f"{version}#{next(self._updates)}-{self._token}"  # an engine never sees a name twice

        def open_update() -> None:
            before_load()
            with self._clock("begin", memory=False):
                self._control.on_all(self.transport.begin)

        self._send(export, plan, {"name": name}, open_update)
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
        shares = control.all_gather((control.node, tuple(serves), export.regions))
        readers = self._readers([node for node, _, _ in shares], [ranks for _, ranks, _ in shares])
        plan = make_plan(
            [regions for _, _, regions in shares], readers, capacity=self._bucket_bytes,
            last=[region.name for region in export.irregular],
        )  # fmt: skip
        self._plan, self._owners, self._serves, self._export = plan, readers.owners, tuple(serves), export
        self._parts = [bucket.of_rank(control.rank) for bucket in plan.buckets]
        self._exchange = self._exchange or Exchange(control, 2 * self._timeout_seconds)
        self._close_buckets()
        owner = readers.owners[control.rank]
        turns = range(min(2, len(plan.buckets)) if owner is not None else 0)
        self._keys = [self._bucket_key(turn, control.rank) for turn in turns]
        if not self._on_device:
            self._buckets = _shared_buckets(control, self._keys, plan.capacity, owner=owner == control.rank)

    def _readers(self, nodes: list[int], serves: list[tuple[int, ...]]) -> Readers:
        if self.transport.read_by == "driver":
            return only_the_driver(nodes, on_device=self._on_device)
        if self.transport.read_by == "senders":
            readers, self._kinds = senders_readers(nodes, serves, on_device=self._on_device)
            return readers
        return readers_of(
            nodes, serves, on_device=self._on_device, expert_parallel=self._expert_parallel
        )  # fmt: skip

    def _make_device_buckets(self) -> None:
        """Also says to all ranks how they are opened, by those who do."""
        assert self._plan is not None
        buckets = [DeviceBucket(key, self._plan.capacity) for key in self._keys]
        self._buckets = list(buckets)
        handles = [bucket.handle() for bucket in buckets] if self.transport.read_by == "engines" else []
        self._handles = self._control.all_gather(handles)

    def _bucket_key(self, turn: int, rank: int) -> str:
        """Of the bucket that a rank can write into."""
        return f"{self.run_key}-{self._owners[rank]}-{turn}"

    def _descriptions(
        self, number: int, sums: dict[str, tuple[int, int]], update: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """What each rank of the engine that this rank leads is told of its bucket; or what senders send."""
        assert self._plan is not None
        turn, told = number % 2, list[dict[str, Any]]()
        if self.transport.read_by != "engines":
            shares = sent_by_each(self._plan.buckets[number], self._kinds, self._plan.experts)
            return [{"tensors": [entry.as_json() for entry in entries]} for entries in shares]
        for rank in self._serves:
            owner = self._owners[rank]
            assert owner is not None
            kind = self._plan.kinds[owner]
            layout = self._plan.buckets[number].layouts[kind]
            place: dict[str, Any] = (
                {"handle": self._handles[rank][turn]} if self._on_device
                else {"path": str(path_of(self._bucket_key(turn, rank)))}
            )  # fmt: skip
            last = number == len(self._plan.buckets) - 1
            told.append(
                self._buckets[turn].describe(layout, sums, **place)
                | {"update": _position(update, number, last, self._plan, kind)}
                | {"ends": last and self._verify == ("verify" in update)}
            )
        return told

    def _send(
        self,
        export: ShardExport,
        plan: Plan,
        update: dict[str, Any],
        before_load: Callable[[], None] = lambda: None,
    ) -> None:
        """Every bucket, once; what of `update` depends on the position is added here."""
        loading: Future[None] | None = None
        irregular = export.irregular_tensors()
        # sub-phases of a verification do not count as the update's own
        write, load = ("verify", "verify") if "verify" in update else ("write", "load")
        for number, bucket_plan in enumerate(plan.buckets):
            bucket = self._buckets[number % 2] if self._buckets else None
            with self._clock(write, bucket_plan.nbytes, memory=number == 0):
                sums = self._write(export, number, bucket, irregular)
            if number == 0:
                before_load()
            with self._clock(load, memory=False):
                totals = self._loaded(loading, sums)
            words = dict(
                zip(bucket_plan.words, zip(bucket_plan.words.values(), totals, strict=True), strict=True)
            )
            descriptions = self._descriptions(number, words, update)
            loading = self._loader.submit(self.transport.load, bucket, descriptions)
        with self._clock(load, plan.bytes):
            self._loaded(loading, torch.zeros(0, dtype=torch.int64, device=current_device()))

    def _loaded(self, loading: Future[None] | None, sums: torch.Tensor) -> list[int]:
        """Every tensor's sum, once all engines have taken the bucket before; raises what one refused it with.

        One small all-reduce: at 512 ranks, gathering everybody's Python objects would take longer than the
        bucket.
        """
        assert self._exchange is not None
        failure: PmdError | None = None
        try:
            if loading is not None:
                loading.result()
        except PmdError as error:
            failure = error
        *totals, failures = self._exchange.add_up(torch.cat([sums, sums.new_full((1,), failure is not None)]))

        def raise_it() -> None:
            if failure is not None:
                raise failure

        if failures:
            self._control.on_all(raise_it)
        return totals

    def _write(
        self,
        export: ShardExport,
        number: int,
        bucket: Bucket | None,
        irregular: Iterator[tuple[str, torch.Tensor]],
    ) -> torch.Tensor:
        """This rank's part of a bucket; returns the sums of the words that it counts, int64 [tensors]."""
        assert self._plan is not None and self._exchange is not None
        plan, part = self._plan.buckets[number], self._parts[number]
        names = {name for layout in plan.layouts for name in layout.entries}
        whole = _take(irregular, {region.name for region in export.irregular} & names)
        if bucket is not None:
            owner = self._owners[self._control.rank]
            assert owner is not None
            bucket.begin(plan.layouts[self._plan.kinds[owner]])
        with torch.no_grad():
            writing = _Writing(plan, part, bucket)
            for region in part.reads:
                held = whole[region.name] if region.name in whole else export.shards[region].tensor()
                writing.read(region, held)
            for round in part.rounds.values():
                came = self._exchange.swap(
                    [
                        (rank, packed(regions, writing.values(regions)))
                        for rank, regions in round.outgoing.items()
                    ],
                    [(rank, message_bytes(regions)) for rank, regions in round.incoming.items()],
                )
                for regions, message in zip(round.incoming.values(), came, strict=True):
                    for region, values in zip(regions, unpacked(regions, message), strict=True):
                        writing.place(region, values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies must be there before an engine is told of them
        return writing.sums

    def close(self) -> None:
        """Give the buckets' memory back."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        self.transport.close()
        self._close_buckets()

    def _close_buckets(self) -> None:
        for bucket in self._buckets:
            bucket.close()
        self._buckets, self._handles = [], []


class _Writing:
    """One rank's work on one bucket. What lies in the rank's own bucket is sent on from there.

    So beside the buckets there are a round's messages, and what the rank reads for other buckets alone.
    """

    def __init__(self, plan: BucketPlan, part: RankPart, bucket: Bucket | None) -> None:
        self._plan, self._counted, self._bucket = plan, part.counted, bucket
        self._elsewhere: dict[Region, torch.Tensor] = {}
        self._numbers = {name: number for number, name in enumerate(plan.words)}
        self.sums = torch.zeros(len(plan.words), dtype=torch.int64, device=current_device())

    def read(self, region: Region, values: torch.Tensor) -> None:
        """Take a region of this rank's own weights; its values in the region's order."""
        if region in self._counted:
            self.sums[self._numbers[region.name]] += word_sum(values, self._plan.words[region.name])
        if self._bucket is not None and region.name in self._bucket.layout.entries:
            self.place(region, values)
        else:
            self._elsewhere[region] = values

    def place(self, region: Region, values: torch.Tensor) -> None:
        self._spot(region).view(values.shape).copy_(values)

    def values(self, regions: Sequence[Region]) -> list[torch.Tensor]:
        """Of regions that are there by now."""
        return [
            self._elsewhere[region] if region in self._elsewhere else self._spot(region) for region in regions
        ]

    def _spot(self, region: Region) -> torch.Tensor:
        assert self._bucket is not None
        target = self._bucket.tensor(self._bucket.layout.entries[region.name])
        return target.narrow(region.dim, region.start, region.length) if region.shape else target


def _shared_buckets(control: Control, keys: Sequence[str], capacity: int, *, owner: bool) -> list[Bucket]:
    """owner: whether this rank is its node's first, which owns the files. Collective."""
    buckets: list[Bucket] = []

    def make() -> None:
        if owner:
            sweep()
        buckets.extend(SharedBucket(key, capacity, owner=owner) for key in keys)

    for turn in (True, False):
        control.on_all(make if owner == turn else lambda: None)
    return buckets


def _take(stream: Iterator[tuple[str, torch.Tensor]], names: set[str]) -> dict[str, torch.Tensor]:
    """The next tensors of the stream, which must be these."""
    taken = {}
    for _ in range(len(names)):
        name, tensor = next(stream, ("", torch.empty(0)))
        if name not in names:
            raise ModelError(f"the export gave tensor {name or 'nothing'} where {min(names)} was due")
        taken[name] = tensor.detach()
    return taken


def _position(update: dict[str, Any], number: int, last: bool, plan: Plan, kind: int) -> dict[str, Any]:
    """What the loader is told of a bucket's place in its update."""
    if "verify" in update:
        return update | {"verify": "next" if number else "first", "verify_last": last}
    return update | ({"manifest": plan.manifest(kind)} if last else {})
