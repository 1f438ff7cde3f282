"""The policy as a model folder during training: what `convert` writes, from the ranks that hold it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.convert.parts import MANIFEST, Hasher, describe, writing
from megatron_pmd.convert.side_files import copy_side_files
from megatron_pmd.convert.untrained import sources, untrained
from megatron_pmd.distributed import Control
from megatron_pmd.files import write_whole
from megatron_pmd.hugging_face import ShardWriter, TensorFiles, write_index


def write_policy(
    tensors: Iterable[tuple[str, torch.Tensor]],
    names: Collection[str],
    model_folder: Path,
    out: Path,
    control: Control,
) -> int:
    """Write the exported tensors (all ranks iterate, the driver writes) as `out`, which appears complete.

    names: of all tensors that come. Files are named and filled as in model_folder, whose configuration,
    tokenizer and untrained layers go with them. An `out` of an earlier attempt at the same iteration is
    replaced. Returns how many tensors are untrained.
    Raises CheckpointError on all ranks when it cannot be written, ModelError when a tensor does not come.
    """
    waiting = iter(tensors)

    def take_part() -> int:
        try:
            return _write(waiting, names, model_folder, out) if control.is_driver else 0
        finally:
            # every rank takes part in gathering each tensor, also after the driver failed
            for _ in waiting:
                pass

    return sum(control.on_all(take_part))


def _write(
    tensors: Iterable[tuple[str, torch.Tensor]], names: Collection[str], model_folder: Path, out: Path
) -> int:
    partial = out.with_name(out.name + ".partial")
    files = TensorFiles(model_folder)
    carried = untrained(files)
    of_file = defaultdict(list)
    for name in [*names, *(tensor.name for tensor in carried)]:
        of_file[files.tensors[name].file.name].append(name)
    entries: dict[str, dict[str, Any]] = {}
    hasher = Hasher()
    # another rank's end, or a full device, is told as what it is
    with writing(out.parent, "the run can be resumed", (OSError,)), ExitStack() as cleanup:
        cleanup.callback(hasher.close)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shards = {f: cleanup.enter_context(ShardWriter(partial / f, own)) for f, own in of_file.items()}
        for name, tensor in itertools.chain(((t.name, t.read()) for t in carried), tensors):
            file = files.tensors[name].file.name
            held = tensor.detach().cpu().contiguous()
            shards[file].add(name, held)
            hasher.add(name, held)
            entries[name] = {**describe(held), "file": file}
        dtype = held.dtype
        for name, hash_ in hasher.results().items():
            entries[name]["sha256"] = hash_
    with writing(out.parent, "the run can be resumed"):
        if len(shards) > 1:
            total = sum(shard.bytes for shard in shards.values())
            write_index(partial, {name: entry["file"] for name, entry in entries.items()}, total)
        copy_side_files(model_folder, partial, dtype=dtype)
        manifest = {
            "direction": "training",
            "source": str(model_folder.resolve()),
            "tensors": entries,
            "untrained": sources(carried),
        }
        write_whole(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    return len(carried)
