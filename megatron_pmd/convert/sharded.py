"""Checkpoints in megatron-core's sharded format, read and written one parameter at a time, in one process.

The format is torch.distributed.checkpoint's, and its tensors have no layout: whichever ranks saved them, a
parameter is read by its key and its place in the whole.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import WriteResult
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_pmd.actor.parameters import Parameter, Piece
from megatron_pmd.errors import CheckpointError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""megatron-core's metadata.json of the checkpoints it writes."""
_DCP = "torch.distributed.checkpoint"
_METADATA = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
    "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PLANNER = ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
ALLOWED = {
    **dict.fromkeys(_METADATA, f"{_DCP}.metadata"),
    **dict.fromkeys(_PLANNER, f"{_DCP}.planner"),
    "WriteResult": f"{_DCP}.storage",
    "_StorageInfo": f"{_DCP}.filesystem",
    "_StoragePrefix": f"{_DCP}.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
    "PosixPath": "pathlib",
    "OrderedDict": "collections",
}
"""All that the index of a checkpoint (a pickle) may name: an unknown file must not be able to run code."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if ALLOWED.get(name) != module:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Target(LoadPlanner):
    """Reads into one given tensor, which is a box of the checkpoint's.

    torch's interface has planning and bytes as well; read_data(), given a plan of tensors, calls neither.
    """

    def __init__(self, box: torch.Tensor) -> None:
        self._box = box

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        box = self._box
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(axis, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError


class ShardedReader:
    """The model's tensors of a checkpoint; the optimizer's, and what is not a tensor, are left alone."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises CheckpointError for a folder that holds no checkpoint, or whose index cannot be read.
        """
        self.folder = folder
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata: Metadata = _IndexUnpickler(file).load()
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no checkpoint here (it would hold .metadata)") from None
        except Exception as error:  # an unpickler of a damaged file raises anything
            raise CheckpointError(f"{folder / '.metadata'}: cannot be read: {error}") from None
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and not key.startswith(("optimizer.", "chained_"))
        }
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._common = metadata.storage_data.get(MetadataIndex("common_state/shard_0_1"))
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    @property
    def layout(self) -> dict[str, int] | None:
        """The layout it was saved under, where the saver noted it."""
        try:
            if self._common is None:  # written by megatron-core up to 0.16
                common = torch.load(self.folder / "common.pt", weights_only=True)
            else:
                with (self.folder / self._common.relative_path).open("rb") as file:
                    file.seek(self._common.offset)
                    data = io.BytesIO(file.read(self._common.length))
                (common,) = torch.load(data, weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError):
            return None
        return common.get("layout") if isinstance(common, dict) else None

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Raises CheckpointError when the checkpoint has no such parameter."""
        return self._tensor(parameter.pieces[0]).properties.dtype

    def read(self, parameter: Parameter) -> torch.Tensor:
        """The whole parameter; a vocabulary's padding is not part of it.

        Raises CheckpointError when the checkpoint lacks (a part of) it, or its file is damaged.
        """
        weight = torch.empty(parameter.shape, dtype=self.dtype(parameter))
        for piece, box in parameter.boxes(weight):
            self._read_piece(piece, len(piece.sizes) - weight.dim(), box)
        return weight

    def _tensor(self, piece: Piece) -> TensorStorageMetadata:
        try:
            return self.tensors[piece.key]
        except KeyError:
            raise CheckpointError(f"{self.folder}: parameter {piece.key} is missing") from None

    def _read_piece(self, piece: Piece, leading: int, box: torch.Tensor) -> None:
        saved = self._tensor(piece)
        if piece.key not in self._chunks:
            # a large mixture of experts has 20,000 chunks under one key: found by layer and expert
            self._chunks[piece.key] = defaultdict(list)
            for chunk in saved.chunks:
                self._chunks[piece.key][tuple(chunk.offsets[:leading])].append(chunk)
        near = TensorStorageMetadata(
            saved.properties, saved.size, self._chunks[piece.key][piece.offsets[:leading]]
        )
        wanted = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        items = create_read_items_for_chunk_list(piece.key, near, [wanted])
        found = sum(torch.Size(item.lengths).numel() for item in items)
        if found != box.numel():
            raise CheckpointError(
                f"{self.folder}: {piece.key} has {found} of {box.numel()} elements of {piece.sizes} "
                f"at {piece.offsets}; its whole shape is {list(saved.size)}, the model's {list(piece.whole)}"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Target(box))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: {piece.key} cannot be read: {error}") from None


class _Source(SavePlanner):
    """Makes each tensor when it is to be written; write_data(), given the plan, asks for nothing else."""

    def __init__(self, make: Callable[[WriteItem], torch.Tensor]) -> None:
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._make(write_item)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def write_part(
    folder: Path,
    number: int,
    parameters: Sequence[tuple[Parameter, torch.dtype]],
    make: Callable[[Parameter], torch.Tensor],
) -> list[WriteResult]:
    """Write one file of a checkpoint and wait until the disk has it: what `finish` needs to know of it.

    make: a parameter's weight in its dtype; called for each in turn, no two are held at one time.
    """
    items, owner = [], {}
    for parameter, dtype in parameters:
        for piece in parameter.pieces:
            item = _write_item(piece, dtype)
            items.append(item)
            owner[item.index] = parameter, piece
    held: dict[Parameter, torch.Tensor] = {}
    writer = FileSystemWriter(folder)
    # files are named after the part, as if each were a rank's own
    writer.set_up_storage_writer(is_coordinator=False, rank=number, use_collectives=False)
    plan = writer.prepare_local_plan(SavePlan(items))

    def resolve(item: WriteItem) -> torch.Tensor:
        parameter, wanted = owner[item.index]
        if parameter not in held:  # its pieces come one after another
            held.clear()
            held[parameter] = make(parameter)
        return next(box for piece, box in parameter.boxes(held[parameter]) if piece is wanted)

    return writer.write_data(plan, _Source(resolve)).wait()


def packed(written: list[WriteResult]) -> str:
    """As text, for a record of the part."""
    return base64.b64encode(pickle.dumps(written)).decode()


def unpacked(text: str) -> list[WriteResult]:
    return _IndexUnpickler(io.BytesIO(base64.b64decode(text))).load()


def _write_item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
    return WriteItem(
        index=MetadataIndex(piece.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(piece.whole),
        ),
    )


def finish(
    folder: Path, parameters: Sequence[tuple[Parameter, torch.dtype]], written: list[WriteResult]
) -> None:
    """Write the index over all parts, and what megatron-core expects beside it.

    Raises CheckpointError when a parameter was not written, or twice.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places = set()
    for parameter, dtype in parameters:
        for piece in parameter.pieces:
            item = _write_item(piece, dtype)
            places.add(item.index)
            assert item.tensor_data is not None
            entry = tensors.setdefault(
                piece.key, TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, [])
            )
            if entry.properties.dtype != dtype:
                raise CheckpointError(
                    f"{piece.key}: {parameter.name} is {dtype}, earlier layers are {entry.properties.dtype}; "
                    "a checkpoint holds them as one tensor: name the dtype to write"
                )
            entry.chunks.append(item.tensor_data.chunk)
    times = Counter(result.index for result in written)
    odd = [index for index in places | times.keys() if times[index] != 1 or index not in places]
    if odd:
        first = min(odd, key=str)
        raise CheckpointError(f"{folder}: {first.fqn} at {first.offset} was not written exactly once")
    writer = FileSystemWriter(folder)
    writer.finish(Metadata(dict(tensors)), [written])
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
