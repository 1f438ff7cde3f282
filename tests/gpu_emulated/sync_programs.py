"""Weight updates through CUDA IPC handles, on ranks with an emulated device each: see launch.py."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from typing import Any

import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.config import RunConfig
from megatron_pmd.distributed import Control
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.weight_sync.loader import BucketError, read_bucket
from megatron_pmd.weight_sync.push import WeightPush
from megatron_pmd.weight_sync.shards import ShardExport
from tests.actor.actor_programs import start
from tests.emulated_cuda.account import held_bytes
from tests.gpu_emulated.engine import EngineProcesses
from tests.gpu_emulated.programs import to_host

BUCKET_BYTES = 2**18
"""Less than any of the models: they come in several buckets, and both are filled more than once."""
FAULTS = (("changes_byte_of", 1), ("dies_at", 0), ("dies_at", 2))
"""What of EngineProcesses is set, and to the number of which bucket."""
DIES = """
import json, torch
from megatron_pmd.weight_sync.device_bucket import DeviceBucket
bucket = DeviceBucket("gone", 4096)
bucket.tensor(bucket.layout.add("w", "float32", (10,))).fill_(1.0)
print(json.dumps(bucket.description(handle=bucket.handle())), flush=True)
torch.cuda.synchronize()
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


def push_into(engine: EngineProcesses, control: Control) -> WeightPush:
    return WeightPush(
        engine, control, "emulated", SubphaseClock(), bucket_bytes=BUCKET_BYTES, timeout_seconds=60,
        on_device=True, expert_parallel=control.world,
    )  # fmt: skip


def updates(cases: dict[str, tuple[RunConfig, bool]], *, together: bool) -> dict[str, Any]:
    """By case: what the engines' ranks were given, Megatron-Bridge's export, and what stays on the device.

    cases: configuration, and whether matrices leave in FP8. together: one engine has its ranks on all
    devices, and divides experts; else each rank leads an engine of its own.
    """
    control = start(next(iter(cases.values()))[0].layout)
    serves = [control.rank]
    if together:
        serves = list(range(control.world)) if control.is_driver else []
    results, device = {}, torch.cuda.current_device()
    with contextlib.closing(EngineProcesses(serves)) as engine:
        for name, (config, fp8) in cases.items():
            control = start(config.layout)
            actor = Actor(config, control)
            shards = ShardExport(actor.bridge, actor.chunks, control, actor.shapes, fp8=fp8)
            torch.cuda.empty_cache()
            before = held_bytes(device)
            report = push_into(engine, control).push(shards, 1, serves=serves)
            results[name] = {
                "left": held_bytes(device) - before, "received": engine.keep(), "buckets": report.buckets,
                "told": engine.descriptions, "export": to_host(dict(actor.export())),
            }  # fmt: skip
            del actor, shards
            gc.collect()
    return results


def faults(config: RunConfig) -> dict[Any, Any]:
    """What each fault of an update ends with, what the update after it brings, and what stays."""
    control = start(config.layout)
    actor = Actor(config, control)
    shards = ShardExport(actor.bridge, actor.chunks, control, actor.shapes)
    result: dict[Any, Any] = {"sender died": sender_that_died(), "export": to_host(dict(actor.export()))}
    torch.cuda.empty_cache()
    device = torch.cuda.current_device()
    before = held_bytes(device)
    with contextlib.closing(EngineProcesses([0])) as engine:
        push = push_into(engine, control)
        for fault, bucket in FAULTS:
            setattr(engine, fault, bucket)
            said = ""
            try:
                push.push(shards, 1, serves=[0])
            except EngineError as error:
                said = str(error)
            setattr(engine, fault, -1)
            push.push(shards, 2, serves=[0])
            result[fault, bucket] = {
                "said": said, "received": engine.keep()[0], "left": held_bytes(device) - before,
            }  # fmt: skip
    return result


def sender_that_died() -> str:
    """What the loader says of a handle whose process was killed."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DIES], capture_output=True, text=True)
    try:
        read_bucket(json.loads(done.stdout))
    except BucketError as error:
        return str(error)
    return done.stderr
