"""Checkpoint in megatron-core's sharded format → Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.actor.lora import ADAPTER
from megatron_pmd.actor.parameters import Model, Parameter, model_of
from megatron_pmd.convert import precision
from megatron_pmd.convert.parts import (
    ConversionJob,
    Hasher,
    Part,
    PartRecord,
    describe,
    divide,
    places,
    tensors_of,
)
from megatron_pmd.convert.sharded import ShardedReader
from megatron_pmd.convert.side_files import copy_side_files
from megatron_pmd.convert.untrained import Untrained, sources, untrained_of
from megatron_pmd.convert.verify import verify
from megatron_pmd.distributed import Control
from megatron_pmd.errors import CheckpointError, ConfigError
from megatron_pmd.fp8 import quantization_config
from megatron_pmd.hugging_face import ShardWriter, write_index

DIRECTION = "megatron-to-hf"
Content = Parameter | Untrained
"""What a folder's tensors are made of."""


def megatron_to_hf(
    checkpoint: Path,
    model_folder: Path,
    out: Path,
    control: Control,
    *,
    dtype: precision.Precision | None = None,
    shard_bytes: int,
    verified: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint of any layout into the model folder `out`; returns its manifest. Collective.

    model_folder: where config.json, tokenizer and chat template come from, and the layers that are not
    trained; the values of its other weights are not looked at.
    dtype: of the tensors written; None: as in the checkpoint. shard_bytes: the largest size of a shard.
    verified: compare before publishing.

    Raises CheckpointError when the checkpoint's tensors are not exactly the model's, or the folder cannot be
    written, or is not what was to be written; ConfigError when `out` exists.
    """
    reader = _opened(checkpoint, model_folder)
    model = model_of(model_folder, reader.tensors)
    padding = padding_rows(reader, model)
    carried = untrained_of(model_folder)
    contents: list[Content] = [*model.parameters, *carried]
    parts = divide(((c, _bytes(c, reader, dtype)) for c in contents), shard_bytes)
    order = {
        "direction": DIRECTION,
        "source": str(checkpoint.resolve()),
        "saved": (checkpoint / ".metadata").stat().st_mtime_ns,
        "model": str(model_folder.resolve()),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
    }
    job = ConversionJob(out, order, control)

    def convert(part: Part[Content], advance: Callable[[int], None]) -> PartRecord:
        path = job.folder / shard_name(part.number, len(parts))
        return _convert(part, reader, dtype, path, advance)

    records = job.work(parts, convert)
    names = [name for content in contents for name in content.tensor_names]
    manifest = _manifest(records, reader, model, [s for n in names for s in precision.stored_names(n, dtype)])
    manifest |= {"untrained": sources(carried), "padding_rows_removed": padding}
    width = precision.TORCH[dtype] if dtype else reader.dtype(model.parameters[0])
    blocks = quantization_config(names) if dtype == "fp8" else None

    def finish() -> None:
        if len(parts) > 1:
            files = {name: entry["file"] for name, entry in manifest["tensors"].items()}
            write_index(job.folder, files, sum(record.written["bytes"] for record in records))
        copy_side_files(model_folder, job.folder, dtype=width, quantization=blocks)

    job.on_driver(finish)
    if verified:
        manifest["verified"] = verify(job.folder, checkpoint, control, dtype=dtype)
    job.publish(manifest)
    return manifest


def _opened(checkpoint: Path, model_folder: Path) -> ShardedReader:
    """The checkpoint; raises ConfigError without a configuration, CheckpointError for adapters alone."""
    if not (model_folder / "config.json").is_file():
        raise ConfigError(f"{model_folder}: no config.json; --model names the model's Hugging Face folder")
    reader = ShardedReader(checkpoint)
    if any(ADAPTER in key for key in reader.tensors):
        raise CheckpointError(
            f"{checkpoint}: it holds adapters alone (actor.lora), no model. The run writes both as folders, "
            "hf/iteration-N merged and adapters/iteration-N for peft: checkpoint.hf_export_every"
        )
    return reader


def _manifest(
    records: list[PartRecord], reader: ShardedReader, model: Model, expected: list[str]
) -> dict[str, Any]:
    """What was made of what. Raises CheckpointError unless every tensor of the folder was converted once."""
    files = {name: record.written["file"] for record in records for name in record.tensors}
    tensors = tensors_of(records, expected)
    return {
        "direction": DIRECTION,
        "source": str(reader.folder.resolve()),
        "layout": reader.layout,
        "tensors": {name: {**entry, "file": files[name]} for name, entry in tensors.items()},
        "parameters": {p.name: places(p) for p in model.parameters},
    }


def shard_name(number: int, count: int) -> str:
    """As transformers names a model's files."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _bytes(content: Content, reader: ShardedReader, dtype: precision.Precision | None) -> int:
    held = content.dtype if isinstance(content, Untrained) else reader.dtype(content)
    return precision.stored_bytes(content.tensor_names[0], content.elements, held, dtype)


def _tensors(content: Content, reader: ShardedReader) -> dict[str, torch.Tensor]:
    if isinstance(content, Untrained):
        return {content.name: content.read()}
    return content.split(reader.read(content))


def _convert(
    part: Part[Content],
    reader: ShardedReader,
    dtype: precision.Precision | None,
    path: Path,
    advance: Callable[[int], None],
) -> PartRecord:
    record, hasher = PartRecord(), Hasher()
    names = [
        s for c in part.parameters for name in c.tensor_names for s in precision.stored_names(name, dtype)
    ]
    try:
        with ShardWriter(path, names) as shard:
            for content in part.parameters:
                for name, plain in _tensors(content, reader).items():
                    for stored, tensor in precision.stored(name, plain, dtype):
                        tensor = tensor.contiguous()
                        hasher.add(stored, tensor)
                        shard.add(stored, tensor)
                        record.tensors[stored] = describe(tensor)
                advance(_bytes(content, reader, dtype))
        for name, hash_ in hasher.results().items():
            record.tensors[name]["sha256"] = hash_
    finally:
        hasher.close()
    record.written = {"file": path.name, "bytes": shard.bytes}
    return record


def padding_rows(reader: ShardedReader, model: Model) -> dict[str, int]:
    """The rows that pad a checkpoint's vocabulary, by key: all it holds beside the model's parameters.

    Raises CheckpointError naming a tensor, or a part of one, that would be lost.
    """
    elements: dict[str, int] = {}
    for parameter in model.parameters:
        for piece in parameter.pieces:
            elements[piece.key] = elements.get(piece.key, 0) + torch.Size(piece.sizes).numel()
    padding: dict[str, int] = {}
    for key, saved in reader.tensors.items():
        if key not in elements:
            raise CheckpointError(
                f"{reader.folder}: {key} {list(saved.size)} is no parameter of the model of config.json"
            )
        lost, row = saved.size.numel() - elements[key], saved.size[1:].numel()
        if lost and not (key.endswith(("word_embeddings.weight", "output_layer.weight")) and lost % row == 0):
            raise CheckpointError(
                f"{reader.folder}: {key} has shape {list(saved.size)}: {lost} elements more than the model "
                "of config.json"
            )
        if lost:
            padding[key] = lost // row
    return padding
