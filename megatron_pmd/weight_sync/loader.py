"""Loads a weight bucket inside an SGLang engine, as its --custom-weight-loader.

SGLang calls load_bucket in every tensor-parallel rank of the engine, with what /update_weights_from_tensor
carried: one byte tensor that holds the bucket's description as JSON. The weights themselves are read from
shared memory, or on a GPU from the device that the actor's rank shares with the engine's.

SGLang ignores what a custom loader returns, and an exception from it kills the whole server. So the outcomes
of all ranks, which may be of several nodes, go into a reply file beside the first one's bucket;
EngineControl.load_bucket reads it, and takes a missing one for a failure.

A model of SGLang's that has no place for a tensor passes over it, most of them with a warning, Qwen3-MoE's
without. So the loader watches what is read of the bucket, the first time that a name comes.

Runs in the engine: imports nothing of the trainer but how a bucket is laid out, opened and answered.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pmd.device import current_device
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
_read_before: set[str] = set()
"""Tensors that the model has been seen to read: what it does with a name does not change."""
_opened: dict[str, torch.Tensor] = {}
"""CUDA IPC handle -> the bucket's bytes, until the sender takes the memory back at the end of the update."""


def load_bucket(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Check the described bucket, load it into the model and leave a reply: the error of each rank, or null.

    A bucket that is not as described changes nothing in the model. Never raises after the description is
    read.
    """
    description = json.loads(bytes(named_tensors[0][1].cpu().numpy()))
    failure, read = None, dict[str, bool]()
    try:
        read = load_description(model, description)
    except Exception as error:  # whatever it is, the server must live to report it
        failure = f"{type(error).__name__}: {error}"
    outcomes, first = _of_all_ranks((failure, read))
    failures = [failure for failure, _ in outcomes]
    # a rank that failed has not said what it would have read
    if not any(failures) and (lost := _lost([read for _, read in outcomes])):
        few = f"{', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}"
        failures[0] = (
            f"BucketError: weight bucket {description['bucket']}: the model has no place for {len(lost)} "
            f"of its tensors, and read nothing of them: {few}"
        )
    if not any(failures):
        _read_before.update(read)
    if first:
        reply = {"bucket": description["bucket"], "failures": failures}
        write_whole(Path(description["reply"]), json.dumps(reply))


Outcome = tuple[str | None, dict[str, bool]]
"""What became of the bucket on a rank; and of tensors that came for the first time, whether it read them."""


def _of_all_ranks(outcome: Outcome) -> tuple[list[Outcome], bool]:
    """The outcomes of all tensor-parallel ranks; and whether this is the first of them."""
    if not dist.is_initialized():
        return [outcome], True
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return group.all_gather_object(outcome), group.is_first_rank


def _lost(read: list[dict[str, bool]]) -> list[str]:
    """Tensors that none of the ranks read that were given them: an expert is read by some ranks only."""
    given = {name for of_rank in read for name in of_rank}
    return sorted(name for name in given if not any(of_rank.get(name) for of_rank in read))


def load_description(model: Any, description: dict[str, Any]) -> dict[str, bool]:
    """Check the described bucket and load it; BucketError if it is not as described.

    Returns, of those of its tensors that come for the first time, whether the model read them.
    """
    weights = read_bucket(description)
    update = description.get("update", {})
    if update.get("verify") == "first":
        _update.digests = _digests(model)
        for parameter in _sent(model).values():
            parameter.data.view(torch.uint8).fill_(POISON)
    if update.get("name") != _update.name or not update:
        _set_cache_scales(model)
    new = [(name, tensor) for name, tensor in weights if name not in _read_before]
    with _Reads(new) if new else contextlib.nullcontext() as reads:
        model.load_weights(weights)
    if torch.cuda.is_available():
        # The copies to the device may still be under way: refilling the bucket now would corrupt them.
        torch.cuda.synchronize()
    _account(update, weights)
    if update.get("verify_last"):
        _compare(_digests(model), update["name"])
    if description.get("ends"):
        _opened.clear()
    return {} if reads is None else {name: name in reads.seen or _is_tied(model, name) for name, _ in new}


class _Reads(TorchDispatchMode):
    """Notes the tensors that an operation takes values of, and not only another view."""

    def __init__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        places = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in weights)
        self._starts, self._places = [start for start, _, _ in places], places
        # nothing is there to be read of an empty tensor
        self.seen = {name for _, nbytes, name in places if nbytes == 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for declared, value in zip(func._schema.arguments, args, strict=False):
            if declared.alias_info is None:  # what is not passed on as a view, nor written to
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        self._note(tensor.data_ptr())
        return func(*args, **(kwargs or {}))

    def _note(self, address: int) -> None:
        number = bisect.bisect_right(self._starts, address) - 1
        if number >= 0:
            start, nbytes, name = self._places[number]
            if address < start + nbytes:
                self.seen.add(name)


def _is_tied(model: Any, name: str) -> bool:
    """Whether the model rightly passes over this tensor: its output layer is its embedding."""
    config = getattr(model, "config", None)
    return name == "lm_head.weight" and bool(getattr(config, "tie_word_embeddings", False))


def _sent(model: Any) -> dict[str, Any]:
    """The parameters that an update has to fill; SGLang marks those that it does not check after one."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_skip_weight_check", False)
    }


def _set_cache_scales(model: Any) -> None:
    """Give the KV cache's scales in FP8 models SGLang's default, 1: no update carries them.

    They are parameters, so a release loses them; and when an update ends, SGLang dies of an assertion if what
    it then finds makes one scale positive and the other not (layers/quantization/kv_cache.py).
    """
    for name, parameter in model.named_parameters():
        if name.endswith((".k_scale", ".v_scale")):
            parameter.data.fill_(1.0)


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
    """Of the bytes of every parameter that an update has to fill."""
    return {
        name: hashlib.blake2b(
            parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16
        ).hexdigest()
        for name, parameter in _sent(model).items()
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
    if "path" in description:
        return _read_file(description, layout)
    handle = description["handle"]
    if str(handle) not in _opened:
        _opened[str(handle)] = _open(description["bucket"], handle, size)
    weights = _views(_opened[str(handle)], layout)
    if wrong := _first_wrong(weights, description["sums"]):
        raise BucketError(_changed(description, wrong, "on this rank's device"))
    return weights


def _open(name: str, handle: list[Any], size: int) -> torch.Tensor:
    try:
        return open_handle(handle, size)
    except (RuntimeError, OSError) as error:  # torch's AcceleratorError: the driver's answer
        why = str(error).partition("\n")[0]
        raise BucketError(
            f"weight bucket {name}: its CUDA IPC handle does not open on device {current_device().index}: "
            f"{why}; does the rank that sent it live, in this PID namespace, without expandable_segments?"
        ) from None


def _read_file(description: dict[str, Any], layout: BucketLayout) -> list[tuple[str, torch.Tensor]]:
    name, size = description["bucket"], description["bytes"]
    path = description["path"]
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
    if not weights:
        return None
    found = torch.stack([word_sum(t, word) for (_, t), (word, _) in zip(weights, sums, strict=True)])
    # one wait for the device, not one for each tensor
    for (name, _), (_, expected), is_now in zip(weights, sums, found.tolist(), strict=True):
        if is_now != expected:
            return name
    return None
