"""What an actor holds of its device and when, by the account of torch's allocator: see launch.py."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_pmd.actor import residency
from megatron_pmd.config import RunConfig
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.outcome import RunOutcome
from megatron_pmd.training.trainer import Trainer
from megatron_pmd.weight_sync.push import WeightPush
from megatron_pmd.weight_sync.shards import ShardExport
from megatron_pmd.weight_sync.transport import ReadBy
from tests.actor.actor_programs import Trial
from tests.actor.tiny_models import STEPS
from tests.emulated_cuda.account import peak_bytes, reset_peak
from tests.gpu_emulated.engine import EngineProcesses

OWNERS = ("megatron", "transformer_engine", "torch.nn", "torch.optim")
"""Modules whose objects keep tensors; megatron_pmd begins like one of them."""
UNKNOWN = "nobody"


class TakesNothing(EngineProcesses):
    """An engine without memory, and without handles: torch keeps what is sent until they are closed."""

    read_by: ReadBy = "driver"

    def load(self, bucket: Any, descriptions: Any) -> None: ...


def blocks() -> dict[int, int]:
    """Address and size asked for of every block that is in use."""
    return {
        block["address"]: block["requested_size"]
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }


def tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Those in the value, and in containers and quantised tensors in it."""
    if isinstance(value, torch.Tensor):
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            yield value
            return
        value = vars(value)  # of Transformer Engine: what it stands for is in its attributes
    if depth and isinstance(value, dict):
        value = list(value.values())
    if depth and isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_in(each, depth - 1)


def holders() -> Iterator[tuple[str, Any]]:
    """Objects that keep tensors, by type and attribute; what functools.lru_cache keeps, by its function."""
    may_hold: dict[type, bool] = {}  # there are a million objects, and few types
    for holder in gc.get_objects():
        kind = type(holder)
        if kind not in may_hold:
            may_hold[kind] = _may_hold(kind)
        if not may_hold[kind]:
            continue
        if kind.__name__ == "_lru_cache_wrapper":
            yield holder.__qualname__, _kept_by(holder)
        else:
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                yield f"{kind.__name__}.{name.lstrip('_')}", value


def _may_hold(kind: type) -> bool:
    """Whether holders() looks at the objects of this type."""
    owner = str(kind.__module__).startswith(OWNERS) and not issubclass(kind, type)
    return owner or kind.__name__ == "_lru_cache_wrapper"


def _kept_by(cache: Any) -> list[Any]:
    """The cache's results: it refers to them, or to a table of them."""
    found = []
    for kept in gc.get_referents(cache):
        found += list(kept.values()) if isinstance(kept, dict) else [kept]
    return found


def named_blocks() -> dict[str, int]:
    """Bytes in use on the device, by who holds them; of several holders the first by name."""
    gc.collect()
    held, names = blocks(), dict[int, str]()
    starts = sorted(held)
    for name, value in holders():
        for tensor in tensors_in(value):
            if not tensor.is_cuda or not tensor.untyped_storage().nbytes():
                continue
            number = int(np.searchsorted(starts, tensor.untyped_storage().data_ptr(), side="right")) - 1
            names[starts[number]] = min(name, names.get(starts[number], name))
    total: dict[str, int] = {}
    for address, size in held.items():
        name = names.get(address, UNKNOWN)
        total[name] = total.get(name, 0) + size
    return total


def tensors_of(trial: Trial) -> dict[str, torch.Tensor]:
    """Every tensor of the model and of the optimizer that has a dimension."""
    found: dict[str, torch.Tensor] = {}
    for chunk in trial.actor.chunks:
        for name, parameter in chunk.named_parameters():
            # of a quantised parameter the rows; the copy by column is there or not
            raw = getattr(parameter, "_rowwise_data", None)
            raw = getattr(parameter, "_data", None) if raw is None else raw
            found[name] = parameter.detach() if raw is None else raw
    for number, part in enumerate(trial.actor.optimizer.chained_optimizers):
        for i, inner in enumerate(getattr(part.optimizer, "sub_optimizers", [part.optimizer])):
            for j, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
                found[f"main {number} {i} {j}"] = parameter.detach()
                states = inner.state.get(parameter, {})
                found |= {f"{k} {number} {i} {j}": v for k, v in states.items() if torch.is_tensor(v)}
    return {name: tensor for name, tensor in found.items() if tensor.dim()}


def bits(trial: Trial) -> dict[str, str]:
    """A digest of each."""
    return {
        name: hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors_of(trial).items()
    }


def places(trial: Trial) -> dict[str, str]:
    """The kind of device that each is on."""
    return {name: tensor.device.type for name, tensor in tensors_of(trial).items()}


def peaks(action: Any) -> dict[str, int]:
    """What the action adds to what is allocated, at most; and what the device itself saw of it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = torch.cuda.current_device()
    reset_peak(device)
    before = torch.cuda.memory_allocated()
    action()
    return {
        "resident": before,
        "added": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
        "device": peak_bytes(device),
    }


def round_trips(cases: dict[str, RunConfig], folder: Path) -> dict[str, Any]:
    """By case: see round_trip; after them out_of_memory of the first."""
    gc.unfreeze()  # holders() looks through all objects, also those of what was imported
    results: dict[str, Any] = {}
    for name, config in cases.items():
        results[name] = round_trip(config, folder / str(len(results)))
    # the last: what a failed pass leaves behind is nobody's concern, a run ends with it
    return results | {"out of memory": out_of_memory(next(iter(cases.values())))}


def round_trip(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Two steps with everything away between them, twice, and two without; bytes by holder and by phase."""
    alone = Trial(config)
    result: dict[str, Any] = {"alone": [alone.step(STEPS[0]), alone.step(STEPS[1])]}
    result["alone bits"] = bits(alone)
    # megatron-core keeps modules with experts alive: what they hold has to be away
    alone.actor.release_optimizer()
    alone.actor.release_parameters()
    del alone
    gc.collect()
    trial, phases = Trial(config), {}
    actor, steps, saved = trial.actor, list[Any](), list[Path]()
    microbatches = actor.microbatches(trial.batch, np.arange(16))
    phases["first anchor"] = peaks(lambda: actor.log_probs(trial.batch, microbatches))
    phases["first update"] = peaks(lambda: steps.append(trial.step(STEPS[0])))
    residency.drop_position_tables(actor.chunks)  # of the lengths that this rollout has: nobody plans them
    result |= {"resident": named_blocks(), "bits": bits(trial), "places": places(trial)}
    result |= {"away": [], "allocated": []}
    for _ in range(2):
        resident = torch.cuda.memory_allocated()
        actor.release_optimizer()
        without_optimizer = torch.cuda.memory_allocated()
        actor.release_parameters()
        result["allocated"].append((resident, without_optimizer, torch.cuda.memory_allocated()))
        result["away"].append(named_blocks())
        actor.wake()
    result |= {"returned bits": bits(trial), "returned places": places(trial)}
    phases["update"] = peaks(lambda: steps.append(trial.step(STEPS[1])))
    result |= {"steps": steps, "last bits": bits(trial)}
    phases["anchor"] = peaks(lambda: actor.log_probs(trial.batch, microbatches))
    phases["save"] = peaks(lambda: saved.append(trial.save(folder)))
    result["saved bits"] = bits(trial)
    phases["load"] = peaks(lambda: actor.load(saved[0]))
    result["loaded bits"] = bits(trial)
    phases["sync"] = sync_peaks(trial)
    actor.release_parameters()
    return result | {"phases": phases}


def save_peak(config: RunConfig, folder: Path) -> tuple[int, int]:
    """What a save adds on this rank, at most, after a step; and how many tensors the model has."""
    trial = Trial(config)
    trial.step(STEPS[0])
    added = peaks(lambda: trial.save(folder))["added"]
    return added, sum(1 for chunk in trial.actor.chunks for _ in chunk.parameters())


def sync_peaks(trial: Trial) -> dict[str, int]:
    """Of an update to an engine that takes nothing."""
    actor = trial.actor
    shards = ShardExport(actor.bridge, actor.chunks, trial.control, actor.shapes)
    bucket_bytes = actor.config.sync.bucket_megabytes * 2**20
    push = WeightPush(
        TakesNothing([]), trial.control, "memory", SubphaseClock(), bucket_bytes=bucket_bytes,
        timeout_seconds=60, on_device=True,
    )  # fmt: skip
    actor.release_optimizer()
    return peaks(lambda: push.push(shards, 1, serves=[0]))


def out_of_memory(config: RunConfig) -> dict[str, tuple[str, str]]:
    """By phase, the outcome of a run that needs more than the device has in it: error and reason."""
    trial, outcomes = Trial(config), {}
    microbatches, kept = [list(range(16))], list[torch.Tensor]()
    torch.cuda.empty_cache()
    sizes = [torch.cuda.mem_get_info()[0] // 2**21 * 2**21, 2**21, 2**18, 512]
    for size in sizes:  # the freed parts of the allocator's blocks, too
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    phases = {
        "anchor": lambda: trial.actor.log_probs(trial.batch, microbatches),
        "update": lambda: trial.step_of(microbatches, 1e-4),
    }
    # of a run, what a phase asks of it before it begins
    run: Any = SimpleNamespace(
        config=config, control=trial.control, state=SimpleNamespace(completed=0),
        log=SimpleNamespace(phase=contextlib.nullcontext), _end_if_it_must=lambda name: None,
    )  # fmt: skip
    for name, action in phases.items():
        try:
            with Trainer.phase(run, name):
                action()
        except Exception as error:
            outcome = RunOutcome.of(error)
            outcomes[name] = str(outcome.error), outcome.reason
    del kept
    return outcomes
