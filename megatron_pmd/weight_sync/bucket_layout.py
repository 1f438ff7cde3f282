"""Where tensors lie in a weight bucket, and the sums by which both ends tell that they arrived whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from megatron_pmd.errors import ModelError

ALIGNMENT = 64
"""Bytes; a cache line, and a multiple of every element size."""


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

    def as_json(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.offset]


@lru_cache
def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor, in bytes."""
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)


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

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
        """Reserve the next place; ModelError if the name is taken or the bucket too small."""
        entry = Entry(name, dtype, tuple(shape), self.used)
        if name in self.entries:
            raise ModelError(f"tensor {name} was exported twice into one weight bucket")
        if self.used + padded(entry.nbytes) > self.capacity:
            raise ModelError(
                f"tensor {name} ({entry.nbytes} bytes) does not fit into a weight bucket of {self.capacity} "
                f"bytes with {self.used} in use; raise sync.bucket_megabytes, or send the bucket first"
            )
        self.entries[name] = entry
        self.used += padded(entry.nbytes)
        return entry

    def as_json(self) -> list[list[Any]]:
        """[name, dtype, shape, offset] of each tensor, in order."""
        return [entry.as_json() for entry in self.entries.values()]

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


def flattened(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which a bucket's tensors lie in a message without gaps: each at a multiple of its size."""
    return sorted(entries, key=lambda entry: -nbytes_of(entry.dtype, ()))


WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def word_sum(tensor: torch.Tensor, word: int) -> torch.Tensor:
    """Sum of the tensor's memory, in its own order, as words of so many bytes, modulo 2^64: int64 [].

    It stays on the tensor's device: reading one number of each tensor would wait for the device as often.
    Finds stale, missing and partly written data, at the speed of memory; not two words exchanged: positions
    are checked through names, shapes and offsets. The sums of a tensor's parts add up to its own, as long as
    no word lies across their edges.
    """
    try:
        words = tensor.view(WORDS[word])
    except RuntimeError:  # a part whose rows are shorter than a word, or that does not start on one
        words = tensor.reshape(-1).clone().view(WORDS[word])
    return words.sum(dtype=torch.int64)


def whole_word(tensor: torch.Tensor) -> int:
    """The largest word that fits a tensor that is not in parts."""
    return math.gcd(8, tensor.itemsize * (tensor.shape[-1] if tensor.ndim else 1)) or 8
