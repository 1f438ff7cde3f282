"""A conversion in parts: each is one file, done by one rank, recorded when on disk, never done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_pmd.actor.parameters import Parameter
from megatron_pmd.distributed import Control
from megatron_pmd.errors import CheckpointError, ConfigError
from megatron_pmd.files import write_whole
from megatron_pmd.hugging_face import DTYPE_NAMES, bytes_of
from megatron_pmd.lock import locked

MANIFEST = "conversion.json"
RECORDS = "records"
ORDER = "order.json"
LOCK = "lock"
"""Held as long as the process lives, or until the folder has its name."""


@dataclass(frozen=True)
class Part[Content]:
    """The parameters of one file, or else what it holds, and the bytes they will take there."""

    number: int
    parameters: list[Content]
    bytes: int


@dataclass
class PartRecord:
    """What a finished part leaves: each Hugging Face tensor's shape, dtype and hash; where it was written."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: Any = None


def divide[Content](parameters: Iterable[tuple[Content, int]], largest_bytes: int) -> list[Part[Content]]:
    """Consecutive parameters, with the bytes each will take, in parts of at most so many bytes."""
    parts: list[Part[Content]] = []
    group: list[Content] = []
    size = 0
    for parameter, bytes_ in parameters:
        if group and size + bytes_ > largest_bytes:
            parts.append(Part(len(parts), group, size))
            group, size = [], 0
        group.append(parameter)
        size += bytes_
    return [*parts, Part(len(parts), group, size)] if group else parts


class Hasher:
    """SHA-256 of tensors, in a thread beside the work; it holds one tensor while the next is made."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[str] | None = None
        self._hashes: dict[str, Future[str]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._hashes[name] = self._thread.submit(sha256, tensor)

    def results(self) -> dict[str, str]:
        return {name: future.result() for name, future in self._hashes.items()}

    def close(self) -> None:
        self._thread.shutdown()


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": DTYPE_NAMES[tensor.dtype]}


class ConversionJob:
    """The folder a conversion is made in, `OUT.partial`, until it is published as OUT."""

    def __init__(self, out: Path, order: dict[str, Any], control: Control) -> None:
        """Open it, or one that an earlier process left with the same order: its finished parts stay.

        Raises ConfigError when OUT exists, or the folder was left by another conversion; LaunchError when one
        is at work in it.
        """
        self.out, self.control, self._lock = out, control, ExitStack()
        self.folder = out.with_name(out.name + ".partial")
        self.records = self.folder / RECORDS
        control.on_driver(lambda: self._open(json.loads(json.dumps(order))))

    def _open(self, order: dict[str, Any]) -> None:
        if self.out.exists():
            raise ConfigError(f"{self.out} exists; name a folder that does not, or remove it")
        with writing(self.folder):
            self._lock.enter_context(
                locked(self.folder / LOCK, f"{self.out} is being made", way_out="wait for it, or end it")
            )
            self.records.mkdir(parents=True, exist_ok=True)
        path = self.folder / ORDER
        if path.is_file():
            left = json.loads(path.read_text())
            changed = sorted(key for key in order.keys() | left.keys() if order.get(key) != left.get(key))
            if changed:
                raise ConfigError(
                    f"{self.folder} was begun by another conversion ({', '.join(changed)} differ): "
                    "give the same words as then to go on, or remove it"
                )
            return
        with writing(self.folder):
            write_whole(path, json.dumps(order))

    def work[Content](
        self,
        parts: Sequence[Part[Content]],
        convert: Callable[[Part[Content], Callable[[int], None]], PartRecord],
    ) -> list[PartRecord]:
        """Convert this rank's share of the parts that are not done; all parts' records, on every rank.

        convert: does one part; is given a function to tell how many more bytes are done. A rank's PmdError is
        raised on all of them.
        """
        control = self.control
        mine = [part for part in parts if part.number % control.world == control.rank]

        def convert_share() -> None:
            with progress("converting", sum(part.bytes for part in mine), shown=control.is_driver) as advance:
                for part in mine:
                    path = self._record(part)
                    if path.is_file():
                        advance(part.bytes)
                        continue
                    with writing(self.folder):
                        record = convert(part, advance)
                        write_whole(path, json.dumps(asdict(record)))

        control.on_all(convert_share)
        return [PartRecord(**json.loads(self._record(part).read_text())) for part in parts]

    def _record(self, part: Part) -> Path:
        return self.records / f"part-{part.number:05}.json"

    def on_driver(self, action: Callable[[], None]) -> None:
        """What the driver alone writes into the folder; its failure is raised on all ranks."""

        def write() -> None:
            with writing(self.folder):
                action()

        self.control.on_driver(write)

    def publish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, leave nothing of the work, and give the folder its name."""

        def rename() -> None:
            write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(self.records)
            (self.folder / ORDER).unlink()
            (self.folder / LOCK).unlink()
            self.folder.rename(self.out)
            self._lock.close()

        self.on_driver(rename)


@contextmanager
def writing(
    folder: Path,
    then: str = "the same command goes on where this one stopped",
    refusals: tuple[type[Exception], ...] = (OSError, RuntimeError),
) -> Iterator[None]:
    """Turn the system's and torch's refusals to write into a CheckpointError that says how to go on.

    refusals: torch's writers raise RuntimeError; so does its arithmetic, where the block has some.
    """
    try:
        yield
    except refusals as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: could not be written (is the disk full?): {reason}; {then}"
        ) from error


@contextmanager
def progress(what: str, total_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, speed and time left, of this rank's share."""
    columns = [
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda done: bar.advance(task, done)


def places(parameter: Parameter) -> dict[str, Any]:
    """Where a parameter lies in a checkpoint and what it is made of, for the manifest."""
    return {
        "shape": list(parameter.shape),
        "tensors": parameter.tensor_names,
        "pieces": [{"key": p.key, "offsets": p.offsets, "sizes": p.sizes} for p in parameter.pieces],
    }


def tensors_of(records: Sequence[PartRecord], expected: Iterable[str]) -> dict[str, dict[str, Any]]:
    """All parts' Hugging Face tensors by name.

    Raises CheckpointError naming one that is in no part, in two, or not of the model.
    """
    times = Counter(name for record in records for name in record.tensors)
    names = set(expected)
    odd = sorted(name for name in names | times.keys() if times[name] != 1 or name not in names)
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]} was converted {times[odd[0]]} times, not once ({len(odd)} such)"
        )
    merged = {name: entry for record in records for name, entry in record.tensors.items()}
    return dict(sorted(merged.items()))
