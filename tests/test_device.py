"""Which parts of actor and engines may be on one device; the loop's own order is in tests/end_to_end."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd import device as device_module
from megatron_pmd.device import (
    DeviceMemory,
    Part,
    SharedDevice,
    describe_left_overs,
    saying_who_fills_it,
)
from megatron_pmd.errors import DeviceFull
from megatron_pmd.training import phases
from megatron_pmd.training.state import Iteration
from recipes import recipe

PARTS: tuple[Part, ...] = ("parameters", "optimizer", "weights", "kv_cache")
TOGETHER = [
    {"parameters", "optimizer"},  # anchor and update
    {"parameters", "weights"},  # sync
    {"weights", "kv_cache"},  # rollout
]


@pytest.mark.parametrize("pair", list(combinations(PARTS, 2)))
def test_two_parts_come_together_only_where_a_phase_has_both(pair):
    for first, second in (pair, pair[::-1]):
        device = SharedDevice()
        device.take(first)
        if set(pair) in TOGETHER:
            device.take(second)
            assert device.held == set(pair)
        else:
            with pytest.raises(RuntimeError, match=f"{second} would come to a device that {first} has not"):
                device.take(second)
            assert device.held == {first}


def test_the_phases_of_an_iteration_follow_one_another():
    device = SharedDevice()
    device.take("weights", "kv_cache")
    for leaving, coming in (
        (("kv_cache", "weights"), ("parameters", "optimizer")),  # release
        (("optimizer",), ("weights",)),  # sync
        (("parameters",), ("kv_cache",)),  # resume
    ):
        device.leave(*leaving)
        device.take(*coming)
    assert device.held == {"weights", "kv_cache"}


# what stays when all have left


GB = 10**9


def test_what_no_one_can_release_is_told_of_the_fullest_device_and_by_what_it_is():
    ranks = [
        DeviceMemory(free=78 * GB, actor=GB, total=85 * GB),
        DeviceMemory(free=77 * GB, actor=2 * GB, total=85 * GB, tensors=GB // 2),
    ]
    told = describe_left_overs(ranks)
    assert "(rank 1) still holds 8.0 GB: 6.0 GB of CUDA contexts" in told
    assert "1.5 GB of freed blocks and 0.5 GB of tensors" in told


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_left_overs_are_measured_between_the_engines_and_the_actor_and_told_once(monkeypatch, begun):
    """On a played device: 85 GB, of which others hold 5 when the engine has gone and no actor is there."""
    held = {"engine": 60 * GB, "rest": 5 * GB}
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (85 * GB - sum(held.values()), 85 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    run: Any = SimpleNamespace(
        rollouts=SimpleNamespace(release=lambda: held.pop("engine")),
        actor=SimpleNamespace(wake=lambda: held.update(actor=50 * GB)),
        control=SimpleNamespace(gather=lambda value: [value]),
        log=SimpleNamespace(say=told.append),
        config=recipe("tiny_moe_cpu"),
        begun=begun,
    )
    iteration = Iteration(4, left_over=[])
    phases.release(run, iteration)
    assert iteration.values == {"device/left_over_gigabytes": 5.0}
    assert held.keys() == {"rest", "actor"}
    assert len(told) == (begun == 2)


def test_on_a_cpu_nothing_is_measured():
    order: list[str] = []
    run: Any = SimpleNamespace(
        rollouts=SimpleNamespace(release=lambda: order.append("engines")),
        actor=SimpleNamespace(wake=lambda: order.append("actor")),
    )
    iteration = Iteration(0, left_over=[])
    phases.release(run, iteration)
    assert (order, iteration.values) == (["engines", "actor"], {})


def test_an_allocation_that_a_device_has_no_room_for_ends_its_phase_with_who_fills_the_device(monkeypatch):
    memory = DeviceMemory(
        free=1_000_000_000, actor=50_000_000_000, total=80_000_000_000, tensors=47_000_000_000
    )
    monkeypatch.setattr(device_module, "device_memory", lambda: memory)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which"
    expected = (
        r"update: of the 80\.0 GB of cpu, 47\.0 GB are tensors of this rank, 3\.0 GB freed blocks of its "
        r"allocator, 29\.0 GB an engine's.*max_tokens_per_microbatch.*Tried to allocate 2\.00 GiB$"
    )
    with pytest.raises(DeviceFull, match=expected), saying_who_fills_it("update"):
        raise torch.OutOfMemoryError(said)
