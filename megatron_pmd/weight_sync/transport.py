"""How a full bucket gets into the engines. Every rank calls every method, in the same order.

A method does this rank's part (a leader's, the driver's, or nothing) and raises a PmdError when that fails;
WeightPush brings the ranks' failures together.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_pmd.config import TRANSPORTS
from megatron_pmd.device import current_device
from megatron_pmd.errors import ConfigError, EngineError
from megatron_pmd.network import address_towards
from megatron_pmd.store import open_store
from megatron_pmd.waiting import waiting_for
from megatron_pmd.weight_sync.bucket_layout import flattened

if TYPE_CHECKING:
    from megatron_pmd.config import RunConfig
    from megatron_pmd.distributed import Control
    from megatron_pmd.engine.fleet import Fleet
    from megatron_pmd.weight_sync.bucket import Bucket

ReadBy = Literal["engines", "leaders", "driver"]


class Transport(Protocol):
    read_by: ReadBy
    """Who reads the buckets: the engines open them; or the rank that leads an engine, or the driver for all
    of them, passes on what is in its own."""

    def begin(self) -> None:
        """The engines hold no version from here on, and can be sent buckets."""

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        """Move the bucket; returns when the engine that this rank leads is done with it. Not collective.

        bucket: None on a rank that writes into none. descriptions: see Bucket.describe; one for each of the
        engine's ranks, where the engines open their buckets.
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
    if config.sync.verify == "full" and transport.read_by != "engines":
        raise ConfigError(f"sync.verify=full: engines do not open the buckets of sync.transport={name}")
    return transport


class Colocated:
    """Engines open the bucket of their node, or device: one copy, from the bucket into the parameter."""

    read_by: ReadBy = "engines"

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(fleet)

    def begin(self) -> None:
        if self._fleet.leads:
            self._fleet.calls.begin_update()

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if self._fleet.leads:
            self._fleet.calls.load_bucket(descriptions)

    def end(self, version: int) -> None:
        if self._fleet.leads:
            self._fleet.calls.end_update(version)

    def close(self) -> None: ...


class Broadcast(Colocated):
    """Each leader sends what is in its bucket to its engine, over gloo, or NCCL where CUDA exists.

    For engines that share no node with actors. The leader and the ranks of its engine are a group of their
    own: an engine that dies in an update breaks nobody else's. What is checked is SGLang's own answer, not
    the loader's sums.
    """

    read_by: ReadBy = "leaders"

    def __init__(self, fleet: Fleet, *, timeout_seconds: float) -> None:
        super().__init__(fleet)
        self._deadline = timedelta(seconds=timeout_seconds)
        self._device = current_device()  # a thread, which is where buckets are sent from, begins with another
        self._group: Any = None
        self._name = ""
        self._version: int | None = None
        """That the engine has been given through the group; None: not yet, or a bucket failed since."""

    @classmethod
    def of_run(cls, config: RunConfig, fleet: Fleet, control: Control, folder: Path) -> Self:
        return cls(fleet, timeout_seconds=config.sync.timeout_seconds)

    def begin(self) -> None:
        if self._fleet.leads:
            # one that was started again has forgotten the group, and its version
            joined = self._version is not None and self._fleet.calls.weight_version() == self._version
            self._version = None
            super().begin()
            if not joined:
                self._join()

    def _join(self) -> None:
        calls = self._fleet.calls
        self._leave()
        calls.leave_group(self._name)
        self._name = f"weights-{secrets.token_hex(4)}"
        engine = urlsplit(calls.spec.url).hostname or ""
        world = 1 + calls.tensor_parallel()
        try:
            store = open_store(address_towards(engine), 0, self._deadline)
        except OSError as error:
            raise EngineError(
                f"no store for engine {calls.spec.number} on the way to {engine}: {error}"
            ) from None

        def join() -> None:
            calls.join_group(store.host, store.port, self._name, rank_offset=1, world=world)

        def found() -> None:
            self._group = _group(store, self._name, world, self._deadline)

        self._side_by_side(found, join)

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if not self._fleet.leads:
            return
        assert bucket is not None, "a leader has a bucket"
        calls, seconds = self._fleet.calls, self._deadline.total_seconds()
        entries = flattened(bucket.layout)
        parts = [bucket.tensor(entry).reshape(-1).view(torch.uint8) for entry in entries]
        message = torch.cat(parts).to(self._device)

        def send() -> None:
            # An engine that refused the request never joins in: without a deadline, this would hang.
            work = dist.broadcast(message, 0, group=self._group, async_op=True)
            assert work is not None, "this rank is in the group"
            try:
                with waiting_for(f"engine {calls.spec.number} to take a weight bucket", seconds):
                    work.wait(self._deadline)
            except RuntimeError as error:
                raise EngineError(
                    f"engine {calls.spec.number} ({calls.spec.url}) did not take a weight bucket of "
                    f"{message.nbytes:,} bytes within {seconds:g} s: {error}"
                ) from None

        tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
        self._side_by_side(send, lambda: calls.load_broadcast(tensors, self._name))

    def end(self, version: int) -> None:
        super().end(version)
        self._version = version

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _side_by_side(self, ours: Callable[[], None], ask: Callable[[], None]) -> None:
        """This rank's part and the request to the engine, at the same time: each waits for the other."""
        with ThreadPoolExecutor(2) as pool:
            asked, done = pool.submit(ask), pool.submit(ours)
            asked.result()  # the engine's failure first: it is the reason
            done.result()


class Disk(Colocated):
    """The driver writes safetensors into a folder that every engine reads, on a file system all share."""

    read_by: ReadBy = "driver"

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
            f"the engine did not join its leader at {store.host}:{store.port}: {error}"
        ) from None
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group
