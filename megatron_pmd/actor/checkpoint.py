"""Checkpoints: megatron-core's sharded format in a folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_pmd.actor import lora
from megatron_pmd.actor.checkpoint_folders import FILES, STATE_FILE, complete, latest, sizes
from megatron_pmd.actor.checkpoint_writer import HelperEnded, Writer, serve_results
from megatron_pmd.actor.digests import digest, digest_of_base
from megatron_pmd.actor.optimizer_state import (
    OPTIMIZER_FORMAT,
    begin_states,
    groups_of,
    leave_out_own_groups,
    name_of,
    own_memory,
    own_step_counts,
    quantize_anew,
    regrouped,
)
from megatron_pmd.distributed import Control
from megatron_pmd.errors import CheckpointError, DamagedCheckpoint
from megatron_pmd.files import write_whole
from megatron_pmd.processes import cores_of_rank
from megatron_pmd.waiting import waiting_for

# torch reports what failed in its readers and writers, a full disk too, by an exception that is no Exception
FAILURES = (Exception, CheckpointException)
UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError)
"""What torch raises of a file whose bytes are not those it wrote, beside RuntimeErrors of its reader."""


class Saver:
    """Writes checkpoints while training goes on; one at a time is on its way to the disk.

    All methods are collective, and raise CheckpointError when writing fails (a full disk, say); earlier
    checkpoints then stay as they were.
    """

    def __init__(self, control: Control, *, keep: int, asynchronous: bool, by_hosts: bool) -> None:
        """by_hosts: hosts gather the optimizer's states (RunConfig.hosts_gather_states), not devices."""
        self._control, self._keep, self._asynchronous = control, keep, asynchronous
        self._by_hosts = by_hosts
        self._queue = AsyncCallsQueue()
        self._pending: tuple[Path, dict[str, Any]] | None = None
        self._writer: Writer | None = None

    def save(
        self,
        folder: Path,
        iteration: int,
        run_state: dict[str, Any],
        chunks: list[Any],
        optimizer: Any,
        write_more: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Begin to write `folder/iteration-N` from all ranks, after what is still being written is published.

        write_more: what the driver adds to the folder; it is done when this returns.
        Returns the checkpoint's path, where it will be once published; not asynchronous: where it is.
        """
        self.publish(wait=True)
        begin_states(optimizer)
        final = folder / f"iteration-{iteration}"
        partial = final.with_suffix(".partial")
        self._control.on_driver(lambda: _made(partial))
        serve_results()
        self._writer = None
        # the replicas hold the same tensors: each writes its share of them
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        try:
            with _all_threads():
                request = dist_checkpointing.save(
                    _sharded_state(chunks, optimizer, is_loading=False, by_hosts=self._by_hosts),
                    str(partial),
                    strategy,
                    async_sharded_save=True,
                    async_strategy="mcore",
                )
        except FAILURES as error:
            raise _not_written(partial, error) from error
        self._control.on_driver(lambda: _written(partial, write_more))
        if request.async_fn is not None:
            self._writer = Writer()
            request = request._replace(async_fn=self._writer.process(request.async_fn))
        # fork: the writer sees the tensors as they are now, whatever training does to them
        self._queue.schedule_async_request(request)
        if self._writer is not None:
            self._writer.has_started()
        self._pending = final, run_state
        if not self._asynchronous:
            self.publish(wait=True)
        return final

    def publish(self, *, wait: bool) -> None:
        """Once all ranks' files are complete: make them a checkpoint by a rename, delete all but the newest.

        wait: until they are; otherwise nothing happens when they are not.
        """
        if self._pending is None:
            return
        final, run_state = self._pending
        partial = final.with_suffix(".partial")
        try:
            if not all(self._control.on_all(lambda: self._has_written(partial, wait=wait))):
                return
            self._queue.maybe_finalize_async_calls(blocking=True)
        except CheckpointError:
            self._pending = None
            raise
        except FAILURES as error:
            self._pending = None
            raise _not_written(partial, error) from error
        self._pending = None
        self._control.on_driver(lambda: self._rename(partial, final, run_state))

    def _has_written(self, partial: Path, *, wait: bool) -> bool:
        """Whether this rank's files are written. CheckpointError if its writer was killed.

        megatron-core takes such a one for done, and then blames another rank, or nobody.
        """
        try:
            with waiting_for(f"the files of {partial}"):
                return self._writer is None or self._writer.is_done(wait=wait)
        except HelperEnded as ended:
            raise _not_written(partial, ended) from ended

    def _rename(self, partial: Path, final: Path, run_state: dict[str, Any]) -> None:
        try:
            write_whole(partial / STATE_FILE, json.dumps(run_state | {FILES: sizes(partial)}))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except OSError as error:
            raise _not_written(partial, error) from error
        for old in complete(final.parent)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)  # what is left of one goes with the next save


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """Within it torch copies with all cores of this rank.

    Training stands still while the optimizer's state is gathered and copied: for 30 billion parameters on 32
    ranks 230 GB are written to a rank's memory (planner/saving.py), which takes one core a minute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, cores_of_rank()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _made(partial: Path) -> None:
    """An empty folder, without those that starts before have left."""
    try:
        for stale in partial.parent.glob("*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _not_written(partial, error) from error


def _written(partial: Path, write_more: Callable[[Path], None]) -> None:
    try:
        write_more(partial)
    except OSError as error:
        raise _not_written(partial, error) from error


def _not_written(partial: Path, error: BaseException) -> CheckpointError:
    kept = latest(partial.parent)
    # torch hides what the system said of a write that it refused
    why = f": {error}" if isinstance(error, HelperEnded) else f" (is the disk full?): {_reason(error)}"
    return CheckpointError(
        f"{partial}: could not be written{why}; "
        + (f"{kept} is complete and will be resumed from" if kept else "there is no earlier checkpoint")
    )


def load(checkpoint: Path, chunks: list[Any], optimizer: Any) -> None:
    """Restore weights, optimizer and random states from a checkpoint of any layout of the same model.

    Raises DamagedCheckpoint for contents that are not what was written, else CheckpointError.
    """
    state = _sharded_state(chunks, optimizer, is_loading=True)
    with _reading(checkpoint):
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    _check_adapters(checkpoint, common, state)
    _check_optimizer(checkpoint, common.get("optimizer_name", "adam"), state["optimizer_name"])
    same_layout = common["layout"] == state["layout"]
    if not same_layout:  # a rank's own state has no meaning where another rank holds its part
        del state["rank"]
    with _reading(checkpoint):
        # the replicas need the same tensors: each reads its share of them, and sends it to the others
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(checkpoint)),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        loaded = dist_checkpointing.load(state, str(checkpoint), strategy)
    for name, chunk in _named(chunks).items():
        # beside adapters the base is missing, which stays as loaded from the model folder
        found = chunk.load_state_dict(loaded["model"][name], strict=state["adapters"] is None)
        assert not found.unexpected_keys and not any(lora.ADAPTER in key for key in found.missing_keys)
    optimizer.load_state_dict(regrouped(loaded["optimizer"], optimizer))
    own_memory(optimizer)
    own_step_counts(optimizer)
    if any(is_float8tensor(p) for chunk in chunks for p in chunk.parameters()):
        quantize_anew(chunks, optimizer)
    if same_layout:
        _restore_random_state(loaded["rank"]["random"])
        if digest(chunks) != loaded["rank"]["digest"]:
            raise DamagedCheckpoint(
                f"{checkpoint}: rank {dist.get_rank()} does not hold the weights it saved: a file has "
                "changed, or this layout of this model cannot be resumed "
                "(megatron-core 0.19.2 loses tied embeddings of some vocabulary sizes over a pipeline)"
            )


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        kind = DamagedCheckpoint if _is_damage(error) else CheckpointError
        raise kind(f"{checkpoint}: cannot be read: {_reason(error)}") from error


def _check_adapters(checkpoint: Path, common: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise CheckpointError where this run's adapters would not do what the saved ones did."""
    saved, own = common.get("adapters"), state["adapters"]
    if saved == own:
        if common.get("base") != state["base"]:
            raise CheckpointError(
                f"{checkpoint}: its adapters belong to another base: this run holds other weights beside "
                "them; model.path must name the model that the run began with"
            )
        return
    words = [
        f"adapters of rank {a['rank']} and alpha {a['alpha']}" if a else "no adapters" for a in (saved, own)
    ]
    raise CheckpointError(
        f"{checkpoint}: it holds {words[0]}, this run has {words[1]}; set actor.lora as the run began with it"
    )


def _check_optimizer(checkpoint: Path, saved: str, own: str) -> None:
    if saved != own:
        raise CheckpointError(
            f"{checkpoint}: was saved with optimizer.name={saved} and cannot be resumed with {own}, whose "
            f"states it lacks; set optimizer.name={saved}, or write its policy as a model folder "
            "(megatron-pmd convert megatron-to-hf) and start from that"
        )


def _is_damage(error: BaseException) -> bool:
    """Whether it says that bytes are wrong; a lost rank or a hanging file server says otherwise."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    return any(isinstance(cause, UNREADABLE) or "PytorchStreamReader" in str(cause) for cause in causes)


def _reason(error: BaseException) -> str:
    """The failure in one line; for torch's collection of all ranks' tracebacks, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:  # none, where only another rank has some
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _sharded_state(
    chunks: list[Any], optimizer: Any, *, is_loading: bool, by_hosts: bool = False
) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    tensors = {
        name: lora.adapters_alone(chunk.sharded_state_dict(metadata=metadata))
        for name, chunk in _named(chunks).items()
    }
    rank, world = dist.get_rank(), dist.get_world_size()
    form = OPTIMIZER_FORMAT | {"distrib_optim_fully_reshardable_mem_efficient": by_hosts}
    states = optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=form)
    if is_loading:
        leave_out_own_groups(states, optimizer)
    for group in groups_of(states):
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]  # HybridDeviceOptimizer notes its classes there, which loading refuses
    return {
        "model": tensors,
        "optimizer": states,
        "optimizer_name": name_of(optimizer),
        "rank": ShardedObject(
            "rank",
            {
                "random": _random_state(),
                "digest": None if is_loading else digest(chunks),
            },
            (world,),
            (rank,),
        ),
        "adapters": lora.description(chunks),
        "base": digest_of_base(chunks),
        "layout": {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "context": parallel_state.get_context_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline": len(chunks),
            "expert": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
            "ranks": world,
        },
    }


def _named(chunks: list[Any]) -> dict[str, Any]:
    """The bare modules; the names stay inside this rank, tensors are filed under their place in the model."""
    return {str(i): unwrap_model(chunk) for i, chunk in enumerate(chunks)}


def _random_state() -> dict[str, Any]:
    """Of this rank; as Megatron-LM's checkpoints have it."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
