"""A weight bucket, which the ranks of a node fill and its engines read; and the one in shared memory."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.shared_memory import PREFIX, SHARED_MEMORY, memory_file, path_to
from megatron_pmd.weight_sync.bucket_layout import (
    BucketLayout,
    Entry,
    padded,
    whole_word,
    word_sum,
)

NEW_SECONDS = 60.0
MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap has no name for it."""


def sweep(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove the links that killed runs of this user have left; returns them.

    A living owner holds a lock on its bucket; the kernel gives it back however the owner ends.
    """
    removed = []
    for path in folder.glob(f"{PREFIX}*"):
        try:
            if time.time() - path.lstat().st_mtime < NEW_SECONDS:
                continue  # it may not be locked yet
            with contextlib.ExitStack() as held:
                if path.exists():  # else its memory went with its owner
                    file = held.enter_context(path.open("rb"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
        except OSError:  # locked, or of another user, or gone meanwhile
            continue
    return removed


def path_of(key: str, folder: Path = SHARED_MEMORY) -> Path:
    """The file of the bucket of this key."""
    return folder / f"{PREFIX}{key}"


class Bucket:
    """Tensors one behind the other in one piece of memory."""

    data: torch.Tensor
    """The whole bucket as bytes."""

    def __init__(self, key: str, capacity: int, folder: Path = SHARED_MEMORY) -> None:
        """key: names the run and the bucket, e.g. `3f2a-0-1`. capacity: bytes, rounded up to ALIGNMENT.

        folder: where engines leave their replies.
        """
        self.key, self.capacity = key, padded(capacity)
        self.path = path_of(key, folder)
        self.layout = BucketLayout(self.capacity)
        self._sequence = 0

    def begin(self, layout: BucketLayout) -> None:
        """These tensors are written next. Only after every engine has answered for the last ones."""
        self.layout = layout

    def tensor(self, entry: Entry) -> torch.Tensor:
        """The place of a tensor in the bucket."""
        region = self.data[entry.offset : entry.offset + entry.nbytes]
        return region.view(getattr(torch, entry.dtype)).view(entry.shape)

    def description(self, **place: Any) -> dict[str, Any]:
        """Of this bucket, with the sums of what it holds; place: see describe, None: the bucket's file."""
        tensors = {name: self.tensor(entry) for name, entry in self.layout.entries.items()}
        words = {name: whole_word(tensor) for name, tensor in tensors.items()}
        sums = {name: (word, int(word_sum(tensors[name], word))) for name, word in words.items()}
        return self.describe(self.layout, sums, **(place or {"path": str(self.path)}))

    def describe(
        self, layout: BucketLayout, sums: Mapping[str, tuple[int, int]], **place: Any
    ) -> dict[str, Any]:
        """What one rank of an engine needs to read its bucket: JSON-serialisable, different at every call.

        layout  of the bucket that this rank reads, which may be another of the same size
        sums    by tensor, the size of its words in bytes and their sum
        place   `path`, the bucket's file, or `handle` (device_bucket.py)
        """
        self._sequence += 1
        return {
            "bucket": f"{self.key}#{self._sequence}",
            "bytes": self.capacity,
            "reply": f"{self.path}.reply",
            "tensors": layout.as_json(),
            "sums": [sums[name] for name in layout.entries],
            **place,
        }

    def close(self) -> None:
        """Give the memory back."""


class SharedBucket(Bucket):
    """A bucket in memory that only this user can open, by a link under /dev/shm; it serves all iterations.

    Its owner makes the link and removes it, by close() or at the exit of its process; the other ranks of the
    node open it to write their parts: what one has written is there for all. The memory goes with the owner,
    however that ends.
    """

    def __init__(self, key: str, capacity: int, folder: Path = SHARED_MEMORY, *, owner: bool = True) -> None:
        """See Bucket. Raises ModelError if the machine's shared memory cannot hold it, or, not being the
        owner, if there is none.
        """
        super().__init__(key, capacity, folder)
        self._owner = owner
        descriptor = self._create(folder) if owner else self._open()
        try:
            self._map = mmap.mmap(descriptor, self.capacity)
        except (OSError, ValueError) as error:
            self.close()
            raise ModelError(f"weight bucket {self.path}: cannot be mapped: {error}") from None
        finally:
            if not owner:
                os.close(descriptor)
        with contextlib.suppress(OSError):  # Linux before 5.14 has no such advice
            # Takes the pages now: a first touch costs more than ten times a copy.
            self._map.madvise(MADV_POPULATE_WRITE)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def _create(self, folder: Path) -> int:
        self.path.unlink(missing_ok=True)  # left by a killed run of the same key
        descriptor = self._reserved(folder)
        self._lock = descriptor  # open for as long as the bucket lives: see sweep()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        atexit.register(self.close)
        return descriptor

    def _reserved(self, folder: Path) -> int:
        """Memory of this capacity, and a link to it in the folder.

        Not a file there: it would keep its memory when this process is killed, and a container's /dev/shm has
        64 MB.
        """
        free = psutil.virtual_memory().available
        if free < self.capacity:
            raise ModelError(
                f"no memory for a weight bucket of {self.capacity:,} bytes: the machine has {free:,} bytes "
                "free; lower sync.bucket_megabytes, or use a machine with more memory"
            )
        try:
            descriptor = memory_file(self.path.name)
            os.posix_fallocate(descriptor, 0, self.capacity)
            self.path.symlink_to(path_to(descriptor))
        except OSError as error:
            raise ModelError(f"weight bucket {self.path}: cannot be made: {error}") from None
        return descriptor

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise ModelError(f"weight bucket {self.path}: cannot be opened: {error.strerror}") from None

    def close(self) -> None:
        """Remove the link, if it is ours; the memory goes when the last process has unmapped it."""
        if not self._owner:
            return
        self.path.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        atexit.unregister(self.close)
