"""What the tests of shares run on ranks: see tests/actor/launch.py."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.distributed import Control
from megatron_pmd.errors import LaunchError
from megatron_pmd.training.batch_shares import distribute
from tests.actor.warm import serve

Case = tuple[dict[str, int], int]
"""A layout, and on how many nodes."""
ARRAYS = ("ids", "engine_log_probs", "policies", "counted", "routed_experts")


def run(program: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return program(**arguments)


def trained(path: Path, cases: dict[str, Case], samples: list[Sample], examples: int, memory: Path) -> Any:
    """By case: this rank's share, what it maps of the file, and whether it trains as with the whole batch."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    return {
        name: _trained(path, layout, nodes, samples, examples, memory)
        for name, (layout, nodes) in cases.items()
    }


def _trained(
    path: Path, layout: dict[str, int], nodes: int, samples: list[Sample], examples: int, memory: Path
) -> dict[str, Any]:
    from megatron_pmd.actor.actor import Actor, Examples
    from tests.actor import actor_programs
    from tests.actor.tiny_models import config_for

    config = config_for(path, layout, actor={"experts": {"replay_routing": True}})
    control = actor_programs.start(config.layout)
    control.node = control.rank * nodes // control.world
    actor = Actor(config, control)
    sampled = len(samples) - examples
    steps = [np.arange(sampled - 4), np.arange(sampled - 4, sampled), np.arange(sampled, len(samples))]
    described = RolloutBatch.describe(samples, 0.8, examples=examples) if control.is_driver else None
    share = distribute(
        described, samples if control.is_driver else [], lambda batch: actor.share(batch, steps), control,
        memory=memory,
    )  # fmt: skip
    result = {
        "node": control.node,
        "here": share.here,
        "arrays": {name: getattr(share.tokens, name).copy() for name in ARRAYS},
        "mapped": mapped_bytes(memory),
        "listed": os.listdir(memory),
        "expected": np.unique(np.concatenate([m for s in steps for m in actor.microbatches(share, s)])),
    }
    whole = RolloutBatch.pack(samples[:sampled], 0.8, examples=samples[sampled:])
    reports = []
    for batch in (whole, share):
        first = actor.microbatches(batch, steps[0])
        anchor = actor.log_probs(batch, first)
        supervised = Examples(actor.microbatches(batch, steps[2]), scale=2.0)
        # a learning rate of 0 leaves the weights as they are for the second
        step = actor.update(batch, first, anchor.log_probs, actor_programs.OBJECTIVE, 0.0, supervised)
        places = [np.arange(*batch.tokens.offsets[i : i + 2]) for i in share.here.tolist()]
        log_probs = anchor.log_probs[np.concatenate([np.zeros(0, np.int64), *places])]
        reports.append([log_probs, anchor.sum_absolute, anchor.histogram, *asdict(step).values()])
    result["reports"] = reports
    return result


def mapped_bytes(memory: Path) -> int:
    """What this process maps of files that were in the folder and have no name."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [words[0].split("-") for words in maps if words[5:6] and words[5].startswith(str(memory))]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


class Watched(list):
    """Samples whose sixth is not packed: the driver is killed, or raises."""

    def __init__(self, samples: list[Sample], memory: Path, how: str) -> None:
        super().__init__(samples)
        self._memory, self._how = memory, how

    def __getitem__(self, number: Any) -> Any:
        if number == 5 and self._how == "driver killed":
            die(self._memory)
        if number == 5 and self._how == "exception":
            print("in use:", used_blocks(self._memory), flush=True)
            raise ValueError("not a sample")
        return super().__getitem__(number)


class Deadly(Control):
    """A rank that is killed when the others have begun to fill the file."""

    memory: Path

    def barrier(self) -> None:
        die(self.memory)


def die(memory: Path) -> None:
    print("in use:", used_blocks(memory), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def used_blocks(memory: Path) -> int:
    space = os.statvfs(memory)
    return space.f_blocks - space.f_bfree


def left_in(memory: Path) -> list[str]:
    """The folder's blocks in use, if any, and its files."""
    used = used_blocks(memory)
    return [*([f"{used} blocks"] if used else []), *os.listdir(memory)]


def interrupted(samples: list[Sample], memory: Path, how: str) -> int:
    """A distribution that does not get to its end, or with how="" does; the blocks then in use."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    control = Deadly(60) if how == "rank killed" and rank == 1 else Control(60)
    if isinstance(control, Deadly):
        control.memory = memory
    share = distribute(
        RolloutBatch.describe(samples, 1.0) if control.is_driver else None, Watched(samples, memory, how),
        lambda batch: np.arange(rank, len(batch), world), control, memory=memory,
    )  # fmt: skip
    assert share.tokens.ids.any()
    used = used_blocks(memory)
    control.barrier()
    return used


def without_room(samples: list[Sample], memory: Path, temporary: Path) -> tuple[list[str], bool, str]:
    """What the driver says, whether the batch is whole, and what is raised."""
    dist.init_process_group("gloo")
    tempfile.tempdir = str(temporary)
    said: list[str] = []
    try:
        share = distribute(
            RolloutBatch.describe(samples, 1.0), samples, lambda batch: np.arange(len(batch)), Control(60),
            say=said.append, memory=memory,
        )  # fmt: skip
    except LaunchError as error:
        return said, False, str(error)
    whole = RolloutBatch.pack(samples, 1.0)
    return said, all(np.array_equal(getattr(share.tokens, n), getattr(whole.tokens, n)) for n in ARRAYS), ""


if __name__ == "__main__":
    serve(int(sys.argv[1]))
