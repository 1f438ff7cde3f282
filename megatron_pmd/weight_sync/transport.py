"""How a full bucket gets into the engines. Every rank calls every method, in the same order.

A method does this rank's part (a leader's, the driver's, or nothing) and raises a PmdError when that fails;
WeightPush brings the ranks' failures together.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.distributed as dist

from megatron_pmd.config import TRANSPORTS
from megatron_pmd.device import current_device
from megatron_pmd.errors import ConfigError, EngineError
from megatron_pmd.network import LOOPBACK
from megatron_pmd.store import open_store
from megatron_pmd.waiting import waiting_for

if TYPE_CHECKING:
    from megatron_pmd.config import RunConfig
    from megatron_pmd.distributed import Control
    from megatron_pmd.engine.fleet import Fleet
    from megatron_pmd.weight_sync.bucket import Bucket


class Transport(Protocol):
    opens_buckets: bool
    """Whether the engines read the buckets themselves. Else only the driver has buckets, and passes on what
    is in them."""

    def begin(self) -> None:
        """The engines hold no version from here on."""

    def connect(self) -> None:
        """What has to be set up once every engine has begun; raises on all ranks what fails on one."""

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        """Move the bucket; returns when the engine that this rank leads is done with it. Not collective.

        bucket: None on a rank that writes into none. descriptions: see Bucket.describe; one for each of the
        engine's ranks, or only the tensors where the engines do not open buckets.
        """

    def end(self, version: int) -> None:
        """The engines serve this version; StaleWeights if one says otherwise."""

    def close(self) -> None:
        """Not collective, never fails."""


class NamedTransport(Transport, Protocol):
    """What sync.transport can name: a transport that a run can make."""

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        """The transport of this rank; folder: the run's, which all nodes see."""


def transport_of(config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Transport:
    """What sync.transport names. Raises ConfigError if it is no transport, or cannot be verified in full."""
    name = config.sync.transport
    kind = TRANSPORTS.load(name, what="sync.transport")
    if not hasattr(kind, "of_run"):
        raise ConfigError(
            f"sync.transport={name!r} is no class with the methods of {__name__}.NamedTransport"
        )
    transport: NamedTransport = kind.of_run(config, fleet, control, folder)
    if config.sync.verify == "full" and not transport.opens_buckets:
        raise ConfigError(f"sync.verify=full: engines do not open the buckets of sync.transport={name}")
    return transport


class Colocated:
    """Engines open the bucket of their node, or device: one copy, from the bucket into the parameter."""

    opens_buckets = True

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(fleet)

    def begin(self) -> None:
        if self._fleet.leads:
            self._fleet.calls.begin_update()

    def connect(self) -> None: ...

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if self._fleet.leads:
            self._fleet.calls.load_bucket(descriptions)

    def end(self, version: int) -> None:
        if self._fleet.leads:
            self._fleet.calls.end_update(version)

    def close(self) -> None: ...


class Broadcast(Colocated):
    """The driver broadcasts every tensor to all ranks of all engines, over gloo, or NCCL where CUDA exists.

    For engines that do not share a node with actors. What is checked is SGLang's own answer, not the loader's
    sums.
    """

    opens_buckets = False

    def __init__(
        self, fleet: Fleet, control: Control, *, tensor_parallel: int, timeout_seconds: float
    ) -> None:
        super().__init__(fleet)
        self._control, self._tensor_parallel = control, tensor_parallel
        self._deadline = timedelta(seconds=timeout_seconds)
        self._group: Any = None
        self._name = ""
        self._members: list[str] = []

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(
            fleet, control, tensor_parallel=config.rollout.tensor_parallel,
            timeout_seconds=config.sync.timeout_seconds,
        )  # fmt: skip

    def connect(self) -> None:
        """Make the group, the first time, and again when an engine has been replaced."""
        if self._members == self._fleet.urls:
            return
        old, self._members = self._name, []
        # engines of other nodes find the driver where the ranks found it
        host = os.environ.get("MASTER_ADDR", LOOPBACK) if self._control.world > 1 else LOOPBACK
        store = self._control.on_driver(lambda: _store(host, self._deadline))
        place = (host, store.port, f"weights-{secrets.token_hex(4)}") if store is not None else None
        host, port, self._name = self._control.from_driver(place)
        world = 1 + len(self._fleet.urls) * self._tensor_parallel

        def join() -> None:
            calls = self._fleet.calls
            if old:
                calls.leave_group(old)
            offset = 1 + self._fleet.urls.index(calls.spec.url) * self._tensor_parallel
            calls.join_group(host, port, self._name, rank_offset=offset, world=world)

        def found() -> None:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
            assert store is not None, "the driver has opened it"
            self._group = _group(store, self._name, world, self._deadline)

        self._control.on_all(lambda: self._side_by_side(found, join))
        self._members = list(self._fleet.urls)

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        def send() -> None:
            assert bucket is not None, "the driver's node has a bucket"
            for entry in bucket.layout.entries.values():
                tensor = bucket.tensor(entry).to(current_device())
                try:
                    # An engine that refused the request never joins in: without a deadline, this would hang.
                    work = dist.broadcast(tensor, 0, group=self._group, async_op=True)
                    assert work is not None, "this rank is in the group"
                    with waiting_for("engines to take a broadcast tensor", self._deadline.total_seconds()):
                        work.wait(self._deadline)
                except RuntimeError as error:
                    self._members = []  # the group is of no use any more
                    raise EngineError(
                        f"broadcast of tensor {entry.name} to {len(self._fleet.urls)} engines was not taken "
                        f"within {self._deadline.total_seconds():g} s: {error}"
                    ) from None

        self._side_by_side(send, lambda: self._fleet.calls.load_broadcast(descriptions[0], self._name))

    def _side_by_side(self, driver: Callable[[], None], leader: Callable[[], None]) -> None:
        """Both parts on a rank that is both, at the same time: each waits for the other."""
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(leader)] if self._fleet.leads else []
            running += [pool.submit(driver)] if self._control.is_driver else []
            for future in running:  # the leader's failure first: it is the reason of the driver's
                future.result()


class Disk(Colocated):
    """The driver writes safetensors into a folder that every engine reads, on a file system all share."""

    opens_buckets = False

    def __init__(self, fleet: Fleet, control: Control, folder: Path) -> None:
        super().__init__(fleet)
        # a server that others started has another working directory
        self._folder, self._control = folder.resolve(), control

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(fleet, control, folder / "weights")

    def begin(self) -> None:
        if self._control.is_driver:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        if self._fleet.leads:
            self._fleet.calls.withdraw_version()

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if not self._control.is_driver:
            return
        from safetensors.torch import save_file

        assert bucket is not None, "the driver's node has a bucket"
        number = len(list(self._folder.iterdir()))
        tensors = {name: bucket.tensor(entry) for name, entry in bucket.layout.entries.items()}
        try:
            save_file(tensors, self._folder / f"model-{number:05d}.safetensors")
        except OSError as error:
            raise EngineError(f"{self._folder}: weights for the engines cannot be written: {error}") from None

    def end(self, version: int) -> None:
        """All files are there: the last bucket's load() has returned on every rank."""
        if self._fleet.leads:
            self._fleet.calls.load_from_disk(self._folder)
            self._fleet.calls.confirm(version)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _store(host: str, deadline: timedelta) -> dist.TCPStore:
    """Where the engines find the driver, on this address of it alone."""
    try:
        return open_store(host, 0, deadline)
    except OSError as error:
        raise EngineError(f"the engines' store cannot listen on {host}: {error}") from None


def _group(store: dist.TCPStore, name: str, world: int, deadline: timedelta) -> Any:
    """A process group beside the default one, with this process as rank 0.

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

    try:
        backend = Backend("nccl" if torch.cuda.is_available() else "gloo")
        group, _ = _new_process_group_helper(
            world, 0, [], backend, PrefixStore(name, store), group_name=GroupName(name), timeout=deadline
        )
    except RuntimeError as error:
        raise EngineError(
            f"the engines did not join the driver at {store.host}:{store.port}: {error}"
        ) from None
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group
