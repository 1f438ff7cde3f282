"""Checkpoints: megatron-core's sharded format in a folder that appears only when it is complete."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_pmd.actor.parallel import Control
from megatron_pmd.errors import CheckpointError
from megatron_pmd.processes import die_with_parent

# `fully_reshardable`: the optimizer's shards can be read under another number of data-parallel ranks
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
STATE_FILE = "run_state.json"
# torch reports what failed in its readers and writers, a full disk too, by an exception that is no Exception
FAILURES = (Exception, CheckpointException)


def _writers_queue_that_dies_with_us() -> None:
    """Give megatron-core's writers a results queue: the server of its own outlives a killed rank for ever.

    Answers dist_checkpointing/strategies/filesystem_async.py, _get_write_results_queue: nothing ends the
    manager it starts but this process's orderly exit. Tested by killing a run, in tests/end_to_end.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with_parent, (signal.SIGKILL, os.getpid()))
        filesystem_async._results_queue = manager.Queue()


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoint folder."""
    complete = [
        path for path in folder.glob("iteration-*") if (path / STATE_FILE).is_file() and not path.suffix
    ]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """What the driver kept beside the tensors: iteration, step, prompt order, weight version."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE}: {error}; delete this checkpoint to resume from another"
        ) from None


def save(
    folder: Path,
    iteration: int,
    run_state: dict[str, Any],
    model: Any,
    optimizer: Any,
    control: Control,
    keep: int,
) -> Path:
    """Write `folder/iteration-N` from all ranks, publish it by renaming, delete all but the newest `keep`.

    Raises CheckpointError when writing fails (a full disk, say); earlier checkpoints stay as they were.
    """
    final = folder / f"iteration-{iteration}"
    partial = final.with_suffix(".partial")
    if control.is_driver:
        for stale in folder.glob("*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    control.barrier()
    _writers_queue_that_dies_with_us()
    try:
        dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False), str(partial))
        if control.is_driver:
            _write_durably(partial / STATE_FILE, json.dumps(run_state))
    except FAILURES as error:
        kept = latest(folder)
        raise CheckpointError(
            f"{partial}: could not be written (is the disk full?): {_reason(error)}; "
            + (f"{kept} is complete and will be resumed from" if kept else "there is no earlier checkpoint")
        ) from error
    control.barrier()
    if control.is_driver:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        done = sorted(folder.glob("iteration-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in done[:-keep]:
            shutil.rmtree(old)
    control.barrier()
    return final


def load(checkpoint: Path, model: Any, optimizer: Any) -> None:
    """Restore weights, optimizer and random states from a checkpoint of any layout of the same model."""
    state = _sharded_state(model, optimizer, is_loading=True)
    try:
        same_layout = dist_checkpointing.load_common_state_dict(str(checkpoint))["layout"] == state["layout"]
        if not same_layout:  # a rank's own state has no meaning where another rank holds its part
            del state["rank"]
        loaded = dist_checkpointing.load(state, str(checkpoint))
    except FAILURES as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be read: {_reason(error)}; "
            "delete this folder to resume from an earlier one"
        ) from error
    unwrap_model(model).load_state_dict(loaded["model"], strict=True)
    optimizer.load_state_dict(_regrouped(loaded["optimizer"], optimizer))
    if same_layout:
        _restore_random_state(loaded["rank"]["random"])
        if _digest(model) != loaded["rank"]["digest"]:
            raise CheckpointError(
                f"{checkpoint}: rank {dist.get_rank()} does not hold the weights it saved; "
                "this layout of this model cannot be resumed "
                "(megatron-core 0.16.1 loses tied embeddings of some vocabulary sizes over a pipeline)"
            )


def _regrouped(saved: dict[Any, Any], optimizer: Any) -> dict[Any, Any]:
    """The optimizer's state as this layout's optimizers want it.

    Expert parallelism gives the experts an optimizer of their own. The moments find their way by parameter,
    but the groups' settings (Adam's numbers and its step count) come back under the number of the optimizer
    that saved them.
    """
    parts = optimizer.chained_optimizers
    states = [saved[key] for key in sorted(key for key in saved if isinstance(key, int))]
    settings = [state["optimizer"] for state in (saved, *states) if "optimizer" in state]
    if len(settings) == len(parts):
        return saved
    # the settings of dense and expert parameters differ in nothing but weight decay
    groups = {group["wd_mult"]: group for part in settings for group in part["param_groups"]}

    def fitted(state: dict[Any, Any], part: Any) -> dict[str, Any]:
        own = [
            {**groups[group["wd_mult"]], "is_expert_parallel": group["is_expert_parallel"]}
            for group in part.optimizer.param_groups
        ]
        return {
            "param_state": state["param_state"],
            "param_state_sharding_type": OPTIMIZER_FORMAT["distrib_optim_sharding_type"],
            "optimizer": {"param_groups": own},
        }

    if len(parts) == 1:
        return fitted(saved, parts[0])
    return {i: fitted(saved[i], part) for i, part in enumerate(parts)}


def _reason(error: BaseException) -> str:
    """The failure in one line; for torch's collection of all ranks' tracebacks, the first rank's."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    tensors = unwrap_model(model).sharded_state_dict(metadata=metadata)
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "model": tensors,
        "optimizer": optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=OPTIMIZER_FORMAT),
        "rank": ShardedObject(
            "rank", {"random": _random_state(), "digest": _digest(model)}, (world,), (rank,)
        ),
        "layout": {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "expert": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
            "ranks": world,
        },
    }


def _digest(model: Any) -> int:
    """Sum of all parameter bits: a wrong byte anywhere changes it."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    return sum(
        int(p.detach().view(integers[p.element_size()]).sum(dtype=torch.int64)) for p in model.parameters()
    )


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
