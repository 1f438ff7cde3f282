"""Hugging Face folder → checkpoint in megatron-core's sharded format."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.actor.model import check_files, check_shapes, shapes_of
from megatron_pmd.actor.parameters import Model, Parameter, model_of
from megatron_pmd.convert import SIDE_FILES, precision, sharded
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
from megatron_pmd.convert.side_files import copy_side_files
from megatron_pmd.convert.untrained import Untrained, sources, untrained, write_untrained
from megatron_pmd.convert.verify import verify
from megatron_pmd.distributed import Control
from megatron_pmd.errors import ConfigError, ModelError
from megatron_pmd.fp8 import is_scale
from megatron_pmd.hugging_face import TensorFiles, bytes_of


def hf_to_megatron(
    source: Path,
    out: Path,
    control: Control,
    *,
    dtype: precision.Precision | None = None,
    part_bytes: int,
    verified: bool = False,
) -> dict[str, Any]:
    """Convert a model folder into the checkpoint `out`; returns its manifest. Collective.

    dtype: of the checkpoint; None: as in the folder, and bf16 for FP8 and MXFP4. part_bytes: the
    checkpoint's files are at most this large, or as large as one parameter. verified: compare before
    publishing.

    Raises ModelError when the folder's tensors are not exactly those of the model its config.json describes,
    ConfigError when `out` exists, CheckpointError when it cannot be written or is not what was to be written.
    """
    if dtype == "fp8":
        raise ConfigError("a checkpoint to train from holds bf16 or fp32; FP8 is for Hugging Face folders")
    files, model, carried, left_out = _checked(source)
    placed = [(p, _dtype(p, files, dtype)) for p in model.parameters]
    dtypes = {p.name: held for p, held in placed}
    parts = divide(((p, p.elements * held.itemsize) for p, held in placed), part_bytes)
    order = {
        "direction": "hf-to-megatron",
        "source": str(source.resolve()),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in source.glob("*.safetensors")},
        "dtype": dtype,
        "part_bytes": part_bytes,
    }
    job = ConversionJob(out, order, control)

    def convert(part: Part[Parameter], advance: Callable[[int], None]) -> PartRecord:
        return _convert(part, files, dtypes, job.folder, advance)

    records = job.work(parts, convert)
    manifest = {
        "direction": "hf-to-megatron",
        "source": str(source.resolve()),
        "layout": None,
        "tensors": tensors_of(records, model.by_tensor()),
        "untrained": sources(carried),
        "left_out": left_out,
        "parameters": {p.name: places(p) for p in model.parameters},
    }

    def finish() -> None:
        (job.folder / SIDE_FILES).mkdir(exist_ok=True)
        copy_side_files(source, job.folder / SIDE_FILES, dtype=placed[0][1])
        write_untrained(carried, job.folder / SIDE_FILES)
        sharded.finish(job.folder, placed, [w for r in records for w in sharded.unpacked(r.written)])

    job.on_driver(finish)
    if verified:
        manifest["verified"] = verify(source, job.folder, control)
    job.publish(manifest)
    return manifest


def _checked(source: Path) -> tuple[TensorFiles, Model, list[Untrained], dict[str, str]]:
    """A folder's tensors, its model, what is carried along, and what is left out, each with the reason.

    Raises ModelError unless the tensors are those of the model.
    """
    check_files(source)
    files, model = TensorFiles(source), model_of(source)
    carried = untrained(files)
    left_out = unused(files, {*model.by_tensor(), *(tensor.name for tensor in carried)}, tied=model.tied)
    check_shapes(source, shapes_of(files.tensors))
    return files, model, carried, left_out


def _convert(
    part: Part[Parameter],
    files: TensorFiles,
    dtypes: dict[str, torch.dtype],
    folder: Path,
    advance: Callable[[int], None],
) -> PartRecord:
    record, hasher = PartRecord(), Hasher()

    def make(parameter: Parameter) -> torch.Tensor:
        dtype = dtypes[parameter.name]
        tensors = {name: precision.plain(name, files).to(dtype) for name in parameter.tensor_names}
        for name, tensor in tensors.items():
            hasher.add(name, tensor)
            record.tensors[name] = describe(tensor)
        advance(parameter.elements * dtype.itemsize)
        return parameter.merge(tensors)

    try:
        placed = [(parameter, dtypes[parameter.name]) for parameter in part.parameters]
        record.written = sharded.packed(sharded.write_part(folder, part.number, placed, make))
        for name, hash_ in hasher.results().items():
            record.tensors[name]["sha256"] = hash_
    finally:
        hasher.close()
    return record


def _dtype(parameter: Parameter, files: TensorFiles, asked: precision.Precision | None) -> torch.dtype:
    """The dtype that a parameter is written in.

    Raises ModelError when a tensor of it is missing, or they differ and none was asked for.
    """
    found = {
        name: precision.dtype_of(name, precision.plain_dtype(name, files), asked)
        for name in parameter.tensor_names
    }
    if len(set(found.values())) > 1:
        raise ModelError(f"{files.folder}: {found} become one parameter; name the dtype to write")
    return next(iter(found.values()))


def unused(files: TensorFiles, used: Collection[str], *, tied: bool) -> dict[str, str]:
    """The folder's tensors that are not used, each with why that is right.

    tied: whether the output layer is the embedding.

    Raises ModelError naming one for which it is not.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(files.folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    ignored = [*(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
    reasons = {}
    for name in sorted(files.tensors.keys() - set(used)):
        if is_scale(name, files.tensors):
            continue  # read together with its values
        if tied and name == "lm_head.weight":
            if bytes_of(files.get(name)) != bytes_of(files.get("model.embed_tokens.weight")):
                raise ModelError(
                    f"{files.folder}: lm_head.weight differs from the embedding, to which config.json ties "
                    "it; set tie_word_embeddings to false if that is meant"
                )
            reasons[name] = "the same as model.embed_tokens.weight"
        elif any(re.search(pattern, name) for pattern in ignored):
            reasons[name] = "transformers does not load it either"
        else:
            raise ModelError(
                f"{files.folder}: tensor {name} belongs to no parameter of the model of config.json"
            )
    return reasons
