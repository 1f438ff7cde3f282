"""Loads a weight bucket inside an SGLang engine, as its --custom-weight-loader.

SGLang calls load_bucket in every tensor-parallel rank of the engine, with what /update_weights_from_tensor
carried: one byte tensor that holds the bucket's description as JSON. The weights themselves are read from
shared memory, or on a GPU from the device that the actor's rank shares with the engine's.

SGLang ignores what a custom loader returns, and an exception from it kills the whole server. So the outcomes
of all ranks, which may be of several nodes, go into a reply file beside the first one's bucket;
EngineControl.load_bucket reads it, and takes a missing one for a failure.

Runs in the engine: imports nothing of the trainer but how a bucket is laid out, opened and answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pmd.files import write_whole
from megatron_pmd.weight_sync.bucket_layout import BucketLayout, word_sum
from megatron_pmd.weight_sync.device_bucket import open_handle

KEPT_MAPPINGS = 4
MADV_POPULATE_READ = 22
POISON = 0x7B
"""Byte that verification overwrites every parameter with: as bf16, fp16 and fp32 a number of no use."""


class BucketError(Exception):
    """The bucket is not what its description says, or an update is not complete."""


@dataclass
class Update:
    """What this engine has been given since the update began."""

    name: str = ""
    received: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Tensor -> dtype and shape."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the parameters, before a verification."""


_update = Update()
_mappings: dict[tuple[str, int, int], torch.Tensor] = {}
"""(path, inode, size) -> the bucket's bytes. Mapping one anew at each use costs as much as copying it."""
_opened: dict[str, torch.Tensor] = {}
"""CUDA IPC handle -> the bucket's bytes, until the sender takes the memory back at the end of the update."""


def load_bucket(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Check the described bucket, load it into the model and leave a reply: the error of each rank, or null.

    A bucket that is not as described changes nothing in the model. Never raises after the description is
    read.
    """
    description = json.loads(bytes(named_tensors[0][1].cpu().numpy()))
    failure = None
    try:
        load_description(model, description)
    except Exception as error:  # whatever it is, the server must live to report it
        failure = f"{type(error).__name__}: {error}"
    failures = _of_all_ranks(failure)
    if failures is not None:
        reply = {"bucket": description["bucket"], "failures": failures}
        write_whole(Path(description["reply"]), json.dumps(reply))


def _of_all_ranks(failure: str | None) -> list[str | None] | None:
    """What became of the bucket on each tensor-parallel rank, on the first; None on the others."""
    if not dist.is_initialized():
        return [failure]
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    failures = group.all_gather_object(failure)
    return failures if group.is_first_rank else None


def load_description(model: Any, description: dict[str, Any]) -> None:
    """Check the described bucket and load it; BucketError if it is not as described."""
    weights = read_bucket(description)
    update = description.get("update", {})
    if update.get("verify") == "first":
        _update.digests = _digests(model)
        for parameter in model.parameters():
            parameter.data.view(torch.uint8).fill_(POISON)
    with _unknown_weights(description["bucket"]):
        model.load_weights(weights)
    if torch.cuda.is_available():
        # The copies to the device may still be under way: refilling the bucket now would corrupt them.
        torch.cuda.synchronize()
    _account(update, weights)
    if update.get("verify_last"):
        _compare(_digests(model), update["name"])
    if description.get("ends"):
        _opened.clear()


def _account(update: dict[str, Any], weights: list[tuple[str, torch.Tensor]]) -> None:
    """Note what has come of an update; at its last bucket, compare with the sender's list."""
    if not update or update.get("verify"):
        return
    if update["name"] != _update.name:
        _update.name, _update.received = update["name"], {}
    for name, tensor in weights:
        if name in _update.received:
            raise BucketError(f"update {update['name']}: tensor {name} came twice")
        _update.received[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if "manifest" not in update:
        return
    expected = {name: (dtype, tuple(shape)) for name, dtype, shape in update["manifest"]}
    for name, (dtype, shape) in expected.items():
        if name not in _update.received:
            raise BucketError(f"update {update['name']}: tensor {name} did not come")
        if _update.received[name] != (dtype, shape):
            came = _update.received[name]
            raise BucketError(
                f"update {update['name']}: tensor {name} came as {came[0]} {list(came[1])}, "
                f"not {dtype} {list(shape)}"
            )
    if extra := sorted(_update.received.keys() - expected.keys()):
        raise BucketError(f"update {update['name']}: tensor {extra[0]} came, which nobody announced")


def _digests(model: Any) -> dict[str, str]:
    """Of every parameter's bytes."""
    return {
        name: hashlib.blake2b(
            parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16
        ).hexdigest()
        for name, parameter in model.named_parameters()
    }


def _compare(digests: dict[str, str], update: str) -> None:
    """BucketError unless loading everything into a model with no weights gives what the engine had."""
    wrong = [name for name, digest in digests.items() if _update.digests.get(name) != digest]
    _update.digests = {}
    if wrong:
        few = ", ".join(wrong[:3])
        raise BucketError(
            f"update {update}: {len(wrong)} parameters of the engine were not what the actor sent: {few}"
        )


def read_bucket(description: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors, as views of its memory; BucketError if it is not as described."""
    size = description["bytes"]
    layout = BucketLayout.from_json(size, description["tensors"])
    if "paths" in description:
        return _read_file(description, layout)
    handle = of_this_rank(description["handles"])
    if str(handle) not in _opened:
        _opened[str(handle)] = open_handle(handle, size)
    weights = _views(_opened[str(handle)], layout)
    if wrong := _first_wrong(weights, description["sums"]):
        raise BucketError(_changed(description, wrong, "on this rank's device"))
    return weights


def _read_file(description: dict[str, Any], layout: BucketLayout) -> list[tuple[str, torch.Tensor]]:
    name, size = description["bucket"], description["bytes"]
    path = of_this_rank(description["paths"])
    try:
        found = os.stat(path)
    except OSError as error:
        raise BucketError(f"weight bucket {name}: cannot open {path}: {error.strerror}") from None
    if found.st_size != size:
        raise BucketError(f"weight bucket {name}: {path} has {found.st_size} bytes, expected {size}")
    key = (path, found.st_ino, size)
    kept = key in _mappings
    weights = _views(_mappings[key] if kept else _map(key), layout)
    wrong = _first_wrong(weights, description["sums"])
    if wrong and kept:
        # A model that writes to what it is given writes to our copy of that page, which then stays as it is.
        weights = _views(_map(key), layout)
        wrong = _first_wrong(weights, description["sums"])
    if wrong:
        raise BucketError(_changed(description, wrong, f"in {path}"))
    return weights


def _changed(description: dict[str, Any], tensor: str, where: str) -> str:
    return (
        f"weight bucket {description['bucket']}: tensor {tensor} {where} has not the checksum it was sent "
        "with; it was changed after it was described"
    )


def _map(key: tuple[str, int, int]) -> torch.Tensor:
    path, _, size = key
    for old in [k for k in _mappings if k[0] == path] + list(_mappings)[: -(KEPT_MAPPINGS - 1)]:
        _mappings.pop(old, None)
    with open(path, "rb") as file:
        # Copy-on-write: a model that changes a tensor it is given does not change it for the next reader.
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    with contextlib.suppress(OSError):  # only a saving of time
        mapping.madvise(MADV_POPULATE_READ)
    return _mappings.setdefault(key, torch.frombuffer(mapping, dtype=torch.uint8))


def _views(data: torch.Tensor, layout: BucketLayout) -> list[tuple[str, torch.Tensor]]:
    return [
        (e.name, data[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape))
        for e in layout.entries.values()
    ]


def _first_wrong(weights: list[tuple[str, torch.Tensor]], sums: list[tuple[int, int]]) -> str | None:
    """Name of a tensor whose words do not add up to the sum it was sent with."""
    for (name, tensor), (word, expected) in zip(weights, sums, strict=True):
        if word_sum(tensor, word) != expected:
            return name
    return None


@contextlib.contextmanager
def _unknown_weights(bucket: str) -> Iterator[None]:
    """BucketError for weights that the model has no parameter for: SGLang's models only warn, and go on."""
    unknown: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not found in params_dict" in record.getMessage():
                unknown.append(record.getMessage())

    collect, models = Collect(logging.WARNING), logging.getLogger("sglang.srt.models")
    models.addHandler(collect)
    try:
        yield
    finally:
        models.removeHandler(collect)
    if unknown:
        few = "; ".join(unknown[:3])
        raise BucketError(f"weight bucket {bucket}: {len(unknown)} weights are unknown to the model: {few}")


def of_this_rank(places: list[Any]) -> Any:
    """Of an engine's buckets, one on each of its nodes or on each of its ranks, in order, this rank's."""
    if len(places) == 1:
        return places[0]
    return places[dist.get_rank() * len(places) // dist.get_world_size()]
