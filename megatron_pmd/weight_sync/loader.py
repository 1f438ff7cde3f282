"""Loads a weight bucket inside an SGLang engine, as its --custom-weight-loader.

SGLang calls load_bucket in every tensor-parallel rank of the engine, with what /update_weights_from_tensor
carried: one byte tensor that holds the bucket's description as JSON. The weights themselves are read from
shared memory.

SGLang ignores what a custom loader returns, and an exception from it kills the whole server. So the outcome
goes into a reply file, one for each rank; EngineControl.load_bucket reads them, and takes a missing one for
a failure.

Runs in the engine: imports nothing of the trainer but the bucket's layout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.weight_sync.bucket import BucketLayout, checksum


class BucketError(Exception):
    """The bucket in shared memory is not what its description says."""


def load_bucket(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Check the described bucket, load it into the model and leave a reply.

    A bucket that is not as described changes nothing in the model. Never raises after the description is
    read.
    """
    description = json.loads(bytes(named_tensors[0][1].cpu().numpy()))
    reply = {"bucket": description["bucket"], "tensors": 0, "error": None}
    try:
        weights = read_bucket(description)
        with _unknown_weights(description["bucket"]):
            model.load_weights(weights)
        if torch.cuda.is_available():
            # The copies to the device may still be under way: refilling the bucket now would corrupt them.
            torch.cuda.synchronize()
        reply["tensors"] = len(weights)
    except Exception as error:  # whatever it is, the server must live to report it
        reply["error"] = f"{type(error).__name__}: {error}"
    target = reply_path(description["reply"], _rank())
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(reply))
    partial.rename(target)


def read_bucket(description: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors, as views of shared memory; BucketError if it is not as described."""
    name, path = description["bucket"], description["path"]
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BucketError(f"weight bucket {name}: cannot open {path}: {error.strerror}") from None
    try:
        size = os.fstat(descriptor).st_size
        if size != description["bytes"]:
            raise BucketError(
                f"weight bucket {name}: {path} has {size} bytes, expected {description['bytes']}"
            )
        # Copy-on-write: a model that changes a tensor it is given does not change it for the next reader.
        data = torch.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    finally:
        os.close(descriptor)
    layout = BucketLayout.from_json(size, description["tensors"])
    found = checksum(data[: layout.used])
    if layout.used != description["used"] or found != description["checksum"]:
        raise BucketError(
            f"weight bucket {name}: {path} has checksum {found} over {layout.used} bytes, expected "
            f"{description['checksum']} over {description['used']}; it was changed after it was described"
        )
    return [
        (e.name, data[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape))
        for e in layout.entries.values()
    ]


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


def reply_path(prefix: str, rank: int) -> Path:
    """Where a tensor-parallel rank of an engine leaves its reply."""
    return Path(f"{prefix}-{rank}.json")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
