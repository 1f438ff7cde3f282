"""The writer's side of a weight bucket: a file in shared memory, filled, sent, filled again."""

from __future__ import annotations

import atexit
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.errors import ModelError

ALIGNMENT = 64
"""Bytes; a cache line, and a multiple of every element size."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Entry:
    name: str
    """As in a Hugging Face checkpoint."""
    dtype: str
    """torch's name without the prefix: `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor, in bytes."""
    elements = 1
    for extent in shape:
        elements *= extent
    return elements * getattr(torch, dtype).itemsize


def padded(nbytes: int) -> int:
    """nbytes rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass
class BucketLayout:
    """Where each tensor lies in a bucket of `capacity` bytes."""

    capacity: int
    entries: dict[str, Entry] = field(default_factory=dict)
    """By name, in the order of their offsets."""
    used: int = 0
    """Bytes taken so far, a multiple of ALIGNMENT."""

    def fits(self, *sizes: int) -> bool:
        """Whether tensors of these sizes (bytes) can all still be added."""
        return self.used + sum(padded(size) for size in sizes) <= self.capacity

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
        """Reserve the next place; ModelError if the name is taken or the bucket too small."""
        entry = Entry(name, dtype, tuple(shape), self.used)
        if name in self.entries:
            raise ModelError(f"tensor {name} was exported twice into one weight bucket")
        if not self.fits(entry.nbytes):
            raise ModelError(
                f"tensor {name} ({entry.nbytes} bytes) does not fit into a weight bucket of {self.capacity} "
                f"bytes with {self.used} in use; raise sync.bucket_megabytes, or send the bucket first"
            )
        self.entries[name] = entry
        self.used += padded(entry.nbytes)
        return entry

    def clear(self) -> None:
        self.entries.clear()
        self.used = 0

    def as_json(self) -> list[list[Any]]:
        """[name, dtype, shape, offset] of each tensor, in order."""
        return [[e.name, e.dtype, list(e.shape), e.offset] for e in self.entries.values()]

    @classmethod
    def from_json(cls, capacity: int, tensors: list[list[Any]]) -> BucketLayout:
        """The inverse of as_json; ModelError if the tensors do not lie where add() puts them."""
        layout = cls(capacity)
        for name, dtype, shape, offset in tensors:
            entry = layout.add(name, dtype, tuple(shape))
            if entry.offset != offset:
                raise ModelError(
                    f"tensor {name} is said to lie at byte {offset}; its order demands {entry.offset}"
                )
        return layout


def checksum(data: torch.Tensor) -> int:
    """Sum of the bytes taken as int64, modulo 2^64: finds stale, missing and partly written data.

    It does not find two words exchanged; positions are checked through sizes and offsets. crc32 costs 5 times
    as much.
    """
    return int(data.view(torch.int64).sum().item())


class SharedBucket:
    """A bucket in a file under /dev/shm that only this user can open; one file serves all iterations.

    The file is removed by close(), and at the exit of this process. Its pages are touched once, here: a
    first touch costs more than ten times a copy.
    """

    def __init__(self, key: str, capacity: int, folder: Path = SHARED_MEMORY) -> None:
        """key: names the run and the rank, e.g. `run-3f2a-rank0-a`. capacity: bytes, rounded up to ALIGNMENT.

        Raises ModelError if the machine's shared memory cannot hold it.
        """
        self.key = key
        self.path = folder / f"megatron-pmd-{key}"
        self.layout = BucketLayout(padded(capacity))
        self._sequence = 0
        self.path.unlink(missing_ok=True)  # left by a killed run of the same key
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        atexit.register(self.close)
        try:
            # Reserves the pages: after a mere truncate, a full /dev/shm would be a SIGBUS in the middle of a
            # sync.
            os.posix_fallocate(descriptor, 0, self.layout.capacity)
            self._map = mmap.mmap(descriptor, self.layout.capacity)
        except OSError as error:
            self.close()
            raise ModelError(
                f"{folder} cannot hold a weight bucket of {self.layout.capacity} bytes ({error.strerror}); "
                f"lower sync.bucket_megabytes or enlarge {folder}"
            ) from None
        finally:
            os.close(descriptor)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        """The whole bucket as bytes."""
        self.data.zero_()

    @property
    def empty(self) -> bool:
        return not self.layout.entries

    def fits(self, *tensors: torch.Tensor) -> bool:
        """Whether all of these can still be placed; tensors that an engine fuses must share a bucket."""
        return self.layout.fits(*(t.nbytes for t in tensors))

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor in; ModelError if it does not fit (ask fits() first)."""
        entry = self.layout.add(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        region = self.data[entry.offset : entry.offset + entry.nbytes]
        region.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        # The gap up to the next tensor belongs to the checksum; an earlier filling may have left bytes there.
        self.data[entry.offset + entry.nbytes : entry.offset + padded(entry.nbytes)].zero_()

    def description(self) -> dict[str, Any]:
        """What an engine needs to read the bucket: JSON-serialisable, different at every call."""
        self._sequence += 1
        return {
            "bucket": f"{self.key}#{self._sequence}",
            "path": str(self.path),
            "bytes": self.layout.capacity,
            "used": self.layout.used,
            "checksum": checksum(self.data[: self.layout.used]),
            "tensors": self.layout.as_json(),
        }

    def clear(self) -> None:
        """Make room for the next tensors. Only after every engine has answered for the last ones."""
        self.layout.clear()

    def close(self) -> None:
        """Remove the file; the memory goes when the last process has unmapped it."""
        self.path.unlink(missing_ok=True)
        atexit.unregister(self.close)
