"""Buckets over the network, in SGLang's own way, once to each machine with engines."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_pmd.device import current_device
from megatron_pmd.engine.placement import groups_of
from megatron_pmd.errors import EngineError
from megatron_pmd.network import address_towards
from megatron_pmd.store import open_store
from megatron_pmd.waiting import waiting_for
from megatron_pmd.weight_sync.bucket_layout import Entry, flattened
from megatron_pmd.weight_sync.transport import Colocated, ReadBy

if TYPE_CHECKING:
    from megatron_pmd.config import RunConfig
    from megatron_pmd.distributed import Control
    from megatron_pmd.engine.fleet import Fleet
    from megatron_pmd.weight_sync.bucket import Bucket


class _Member(NamedTuple):
    """What one rank says when an update begins."""

    senders: tuple[int, ...]
    """To the machine of its engine."""
    name: str = ""
    """Of the groups that it was in through the last update; "": in none, or its engine has forgotten them."""
    host: str = ""
    """Of the engine that it leads."""
    engine_ranks: int = 0
    """Of that engine; 0: it leads none, or the engine is left out."""


class _Meeting(NamedTuple):
    """Where the members of groups find each other."""

    host: str
    port: int
    name: str
    """Of the groups, but for their numbers."""


class Broadcast(Colocated):
    """All engines of a machine take a bucket from the same messages, over gloo, or NCCL where CUDA exists.

    For engines that share no node with actors. The ranks that send to a machine (Fleet.senders) share out the
    experts, and the first has all else. They send one after the other, each in a group in which it is the
    first, before the other senders and the ranks of all engines there. So a machine takes every byte once,
    and an engine that dies in an update breaks no other machine's groups. The other senders are in a group
    for their network cards: NCCL shares a message out to those of all members on its way.

    Every leader asks its own engine to take the messages; what is checked is SGLang's own answer, not the
    loader's sums.
    """

    read_by: ReadBy = "senders"

    def __init__(self, fleet: Fleet, control: Control, *, timeout_seconds: float) -> None:
        super().__init__(fleet)
        self._control = control
        self._deadline = timedelta(seconds=timeout_seconds)
        self._device = current_device()  # a thread, which is where buckets are sent from, begins with another
        self._store: dist.TCPStore | None = None
        self._name = ""
        self._groups: list[Any] = []
        """By the sender who is its first member."""
        self._own_ranks = 0
        """Of the engine that this rank leads."""
        self._engine_ranks: list[int] = []
        """Of the engines in the groups, in their order."""
        self._version: int | None = None
        """That the engines have been given through the groups; None: not yet, or a bucket failed since."""

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(fleet, control, timeout_seconds=config.sync.timeout_seconds)

    def begin(self) -> None:
        own, told = self._fleet.senders, self._control.on_all(self._open)
        members = {rank: member for rank, member in enumerate(told) if member.senders == own}
        engines = {rank: member for rank, member in members.items() if member.engine_ranks}
        engine_ranks = [member.engine_ranks for member in engines.values()]
        names = {members[rank].name for rank in (*own, *engines)}
        joined = names == {self._name} != {""} and engine_ranks == self._engine_ranks
        host = ""
        if engines and not joined and self._control.rank == own[0]:
            host = next(iter(engines.values())).host
        stores = self._control.on_all(lambda: self._store_towards(host) if host else None)
        if not joined:
            self._leave()
            self._engine_ranks = engine_ranks
            meeting = stores[own[0]]
            if meeting is not None:
                before = sum(m.engine_ranks for rank, m in engines.items() if rank < self._control.rank)
                self._join(meeting, groups_of(member.senders for member in told), before)

    def _open(self) -> _Member:
        """The engine that this rank leads withdraws its version; one that was started again has forgotten its
        groups, and its version.
        """
        version, self._version = self._version, None
        name, senders = self._name if version is not None else "", self._fleet.senders
        if not self._fleet.leads:
            return _Member(senders, name)
        calls = self._fleet.calls
        if calls.weight_version() != version:
            name = ""
        super().begin()
        if not name:
            self._own_ranks = calls.tensor_parallel()
        return _Member(senders, name, urlsplit(calls.spec.url).hostname or "", self._own_ranks)

    def _store_towards(self, host: str) -> _Meeting:
        """A store where the groups towards a machine meet."""
        try:
            store = self._store = open_store(address_towards(host), 0, self._deadline)
        except OSError as error:
            raise EngineError(f"no store for engines on the way to {host}: {error}") from None
        return _Meeting(store.host, store.port, f"weights-{secrets.token_hex(4)}")

    def _join(self, meeting: _Meeting, groups: int, engine_ranks_before: int) -> None:
        """groups: so many. engine_ranks_before: of the engines that come before this rank's in a group."""
        host, port, name = meeting
        senders, left, self._name = self._fleet.senders, self._name, name
        world, offset = len(senders) + sum(self._engine_ranks), len(senders) + engine_ranks_before

        def ask() -> None:
            for number in range(groups):
                self._fleet.calls.leave_group(f"{left}-{number}")
                self._fleet.calls.join_group(host, port, f"{name}-{number}", rank_offset=offset, world=world)

        def found() -> None:
            place = senders.index(self._control.rank)
            try:
                here = self._store if place == 0 else None
                store = here or dist.TCPStore(host, port, timeout=self._deadline)
                for number in range(groups):
                    rank = (place - number) % len(senders)
                    self._groups.append(_group(store, f"{name}-{number}", rank, world, self._deadline))
            except RuntimeError as error:
                raise EngineError(f"engines did not join their senders at {host}:{port}: {error}") from None

        try:
            self._side_by_side(found, ask)
        except EngineError:
            self._store = None  # engines that wait there for one that died do so no longer
            raise

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if not self._engine_ranks:
            return
        for number, description in enumerate(descriptions):
            entries = flattened(
                Entry(name, dtype, tuple(shape), at) for name, dtype, shape, at in description["tensors"]
            )
            if entries:
                try:
                    self._load(number, bucket, entries)
                except EngineError:
                    self._leave()  # an engine that waits for this rank gets an error, and can be asked again
                    raise

    def _load(self, number: int, bucket: Bucket | None, entries: Sequence[Entry]) -> None:
        """What one of the senders sends of its bucket."""

        def send() -> None:
            if self._control.rank == self._fleet.senders[number]:
                assert bucket is not None, "it has a bucket"
                parts = [bucket.tensor(entry).reshape(-1).view(torch.uint8) for entry in entries]
                message = torch.cat(parts).to(self._device)
            else:
                size = sum(entry.nbytes for entry in entries)
                message = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._send(message, self._groups[number])

        def ask() -> None:
            tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
            self._fleet.calls.load_broadcast(tensors, f"{self._name}-{number}")

        self._side_by_side(send, ask)

    def _send(self, message: torch.Tensor, group: Any) -> None:
        """message: uint8 [bytes]; what it holds counts on the group's first."""
        seconds = self._deadline.total_seconds()
        work = dist.broadcast(message, 0, group=group, async_op=True)
        assert work is not None, "this rank is in the group"
        try:
            # An engine that refused the request never joins in: without a deadline, this would hang.
            with waiting_for("engines elsewhere to take a weight bucket", seconds):
                work.wait(self._deadline)
        except RuntimeError as error:
            raise EngineError(
                f"the engines that ranks {', '.join(map(str, self._fleet.senders))} send to did not take a "
                f"weight bucket of {message.nbytes:,} bytes within {seconds:g} s: {error}"
            ) from None

    def end(self, version: int) -> None:
        super().end(version)
        self._version = version

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []

    def _side_by_side(self, ours: Callable[[], None], ask: Callable[[], None]) -> None:
        """This rank's part, if it sends, and the request to its engine, if it leads one: each waits for the
        other.
        """
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(ask) if self._fleet.leads else None
            done = pool.submit(ours) if self._control.rank in self._fleet.senders else None
            for part in (asked, done):  # the engine's failure first: it is the reason
                if part is not None:
                    part.result()


def _group(store: dist.Store, name: str, rank: int, world: int, deadline: timedelta) -> Any:
    """A process group beside the default one, with this process as one rank.

    SGLang's engines join with torch's private _new_process_group_helper (sglang/srt/utils/common.py,
    init_custom_process_group): torch has no public way to make a group with outsiders to the default one.
    """
    from torch.distributed.distributed_c10d import (
        Backend,
        GroupName,
        PrefixStore,
        _new_process_group_helper,
        _world,
    )

    backend = Backend("nccl" if torch.cuda.is_available() else "gloo")
    group, _ = _new_process_group_helper(
        world, rank, [], backend, PrefixStore(name, store), group_name=GroupName(name), timeout=deadline
    )
    _world.pg_group_ranks[group] = {number: number for number in range(world)}
    return group
