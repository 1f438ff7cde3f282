"""How a full bucket gets into the engines. Every rank calls every method, in the same order.

A method does this rank's part (a leader's, the driver's, or nothing) and raises a PmdError when that fails;
WeightPush brings the ranks' failures together.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from megatron_pmd.config import TRANSPORTS
from megatron_pmd.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from megatron_pmd.config import RunConfig
    from megatron_pmd.distributed import Control
    from megatron_pmd.engine.fleet import Fleet
    from megatron_pmd.weight_sync.bucket import Bucket

ReadBy = Literal["engines", "senders", "driver"]


class Transport(Protocol):
    read_by: ReadBy
    """Who reads the buckets: the engines open them; or the ranks that send to engines elsewhere, or the
    driver for all of them, pass on what is in their own."""

    def begin(self) -> None:
        """The engines hold no version from here on, and can be sent buckets."""

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        """Move the bucket; returns when the engine that this rank leads is done with it. Not collective.

        bucket: None on a rank that writes into none. descriptions: see Bucket.describe; one for each of the
        engine's ranks, where the engines open their buckets. Where ranks send: the `tensors` that each sender
        to a machine sends of its bucket, in the order of Fleet.senders.
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
            self._folder.mkdir(parents=True, exist_ok=True)
        if self._fleet.leads:
            self._fleet.calls.withdraw_version()

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if not self._control.is_driver:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        assert bucket is not None, "the driver's node has a bucket"
        number = len(list(self._folder.iterdir()))
        tensors = {name: bucket.tensor(entry) for name, entry in bucket.layout.entries.items()}
        try:
            save_file(tensors, self._folder / f"model-{number:05d}.safetensors")
        except (OSError, SafetensorError) as error:  # the latter where the system refuses to write
            raise EngineError(f"{self._folder}: weights for the engines cannot be written: {error}") from None

    def end(self, version: int) -> None:
        """All files are there: the last bucket's load() has returned on every rank."""
        if self._fleet.leads:
            self._fleet.calls.load_from_disk(self._folder)
            self._fleet.calls.confirm(version)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
