"""Hugging Face model folders: tensors read one at a time, shards written as their tensors come."""

from __future__ import annotations

import io
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from megatron_pmd.errors import ModelError
from megatron_pmd.files import read_object

INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""The dtypes that a shard can hold, in safetensors' words."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MXFP4 = "MXFP4"
"""Of a tensor of which a folder holds blocks and scales: the experts of gpt-oss, as it is published."""
BLOCKS, SCALES = "_blocks", "_scales"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Endings of files that hold weights: all others in a model folder go with its configuration."""
OPEN_FILES = 8
"""A parameter's tensors lie in a few neighbouring files."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor."""

    file: Path
    shape: list[int]
    dtype: str
    """In safetensors' words: F32, BF16, F8_E4M3 …; or MXFP4."""
    begin: int
    bytes: int
    """Where its data is in the file."""


def shards_of(folder: Path) -> tuple[list[Path], set[str]]:
    """The files that hold a model folder's tensors, and the tensors that its index names, if it has one.

    Raises ModelError for an index without its table, or one that names files which are not there.
    """
    index = read_object(folder / INDEX)
    if index is None:
        return sorted(folder.glob("*.safetensors")), set()
    indexed = index.get("weight_map")
    if not isinstance(indexed, dict):
        raise ModelError(f"{folder / INDEX}: no weight_map in it; copy the file from the model's source")
    names = sorted(set(indexed.values()))
    if absent := [name for name in names if not (folder / name).exists()]:
        others = f", nor are {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(
            f"{folder}: {absent[0]} is not there{others}, of the {len(names)} files that {INDEX} names; "
            "copy what is missing from the model's source"
        )
    return [folder / name for name in names], set(indexed)


class TensorFiles:
    """The tensors of a model folder by name, each read when it is asked for.

    They are not mapped: the mapped pages of large shards would look like memory that the process needs.
    Blocks and scales in MXFP4 are the one tensor that they stand for.
    """

    def __init__(self, folder: Path) -> None:
        """Read all headers.

        Raises ModelError for a truncated file, a tensor or file that the index names and the folder lacks, or
        blocks whose scales are not there.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._scales: dict[str, StoredTensor] = {}
        self._open: OrderedDict[Path, io.FileIO] = OrderedDict()
        files, indexed = shards_of(folder)
        for file in files:
            self._read_header(file)
        missing = sorted(indexed - self.tensors.keys())
        if missing:
            raise ModelError(
                f"{folder}: tensor {missing[0]} is in the index but not in its file ({len(missing)} in all)"
            )
        for name in [name for name, tensor in self.tensors.items() if tensor.dtype == "U8"]:
            if name.endswith(BLOCKS):
                self._join(name.removesuffix(BLOCKS))

    def _join(self, name: str) -> None:
        """Put a tensor in the place of its blocks and scales.

        blocks   uint8 [experts, rows, columns / 32, 16]: the tensor's [experts, columns, rows] transposed
        scales   uint8 [experts, rows, columns / 32]
        """
        blocks, scales = self.tensors.pop(name + BLOCKS), self.tensors.pop(name + SCALES, None)
        if scales is None or blocks.shape[:-1] != scales.shape or len(scales.shape) != 3:
            found = f"has shape {scales.shape}" if scales else "is missing"
            raise ModelError(
                f"{self.folder}: {name}{BLOCKS} has shape {blocks.shape}, and {name}{SCALES} {found}; MXFP4 "
                "is read in blocks [experts, rows, columns / 32, 16], each with its scale"
            )
        experts, rows, groups, half = blocks.shape
        self.tensors[name] = replace(blocks, shape=[experts, 2 * half * groups, rows], dtype=MXFP4)
        self._scales[name] = scales

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt"):
                pass  # it checks the header against the size of the file
        except Exception as error:  # safetensors has its own exception type, not derived from OSError
            raise ModelError(f"{file}: cannot be read: {error}; is the file complete?") from None
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                self.tensors[name] = StoredTensor(
                    file, entry["shape"], entry["dtype"], 8 + length + begin, end - begin
                )

    def get(self, name: str) -> torch.Tensor:
        """The tensor, read from its file; bf16 where that is MXFP4.

        Raises ModelError when the folder has no such tensor, or its file became shorter.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        stored = self.tensors[name]
        if stored.dtype != MXFP4:
            return self._read(name, stored).view(DTYPES[stored.dtype]).reshape(stored.shape)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        scales = self._scales[name]
        blocks = self._read(name + BLOCKS, stored).reshape(*scales.shape, -1)
        return convert_moe_packed_tensors(blocks, self._read(name + SCALES, scales).reshape(scales.shape))

    def _read(self, name: str, stored: StoredTensor) -> torch.Tensor:
        """The bytes of a tensor."""
        if stored.file not in self._open:
            self._open[stored.file] = stored.file.open("rb", buffering=0)
        self._open.move_to_end(stored.file)
        data = torch.empty(stored.bytes, dtype=torch.uint8)
        file, into, done = self._open[stored.file], data.numpy().data, 0
        file.seek(stored.begin)
        while done < stored.bytes:  # the system reads at most 2 GiB at a time
            count = file.readinto(into[done:])
            if not count:
                raise ModelError(f"{stored.file}: ends within tensor {name}")
            done += count
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return data


class ShardWriter:
    """One safetensors file, written tensor by tensor: room for the header is left and filled at the end."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """names: those of the tensors to come, in any order."""
        self._path, self._waiting = path, set(names)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # an entry's dtype, shape and offsets take less than this
        room = sum(len(json.dumps(name)) + 200 for name in self._waiting) + 100
        self._data = 8 + -(-room // 8) * 8
        self._file = path.open("wb")
        self._file.seek(self._data)
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; raises ModelError for one that is not awaited, so for a second one of a name."""
        if name not in self._waiting:
            raise ModelError(f"{self._path}: tensor {name} comes a second time, or does not belong here")
        self._waiting.remove(name)
        data = bytes_of(tensor)
        self._file.write(data)
        begin, self.bytes = self.bytes, self.bytes + len(data)
        self._header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.bytes],
        }

    def finish(self) -> None:
        """Write the header, wait for the disk; raises ModelError when a tensor did not come."""
        if self._waiting:
            raise ModelError(f"{self._path}: tensor {min(self._waiting)} did not come")
        header = json.dumps(self._header).encode().ljust(self._data - 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.flush()
        os.fsync(self._file.fileno())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_index(folder: Path, files: dict[str, str], total_bytes: int) -> None:
    """The index of a sharded folder; files: the file of each tensor."""
    text = json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}, indent=2
    )
    (folder / INDEX).write_text(text + "\n")
