"""The last check before the first phase: how fast the ranks' all-reduce is, and which node slows it down."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_pmd.distributed import Control
from megatron_pmd.errors import LaunchError
from megatron_pmd.launch.cluster import Preflight
from megatron_pmd.node.allocation import host_name

REPETITIONS = 5
SLOW_SHARE = 0.5
"""A node is named when its bandwidth with the first one is below this share of the nodes' median."""


def check_bandwidth(control: Control) -> None:
    """Compare the all-reduce with the profile's floor; collective. Raises LaunchError, naming slow nodes.

    Bus bandwidth, as NCCL's tests define it: 2 (n - 1) / n x bytes / seconds.
    """
    limits = Preflight.model_validate_json(os.environ.get("PMD_PREFLIGHT") or "{}")
    floor = limits.all_reduce_gigabytes_per_second
    if floor is None or control.world == 1:
        return
    slowest = min(control.all_gather(_all_reduce(None, control.world)))
    if slowest >= floor:
        return
    slow = slow_nodes(_by_node(control))
    state = os.environ.get("PMD_STATE")
    if slow and state and control.is_driver:
        (Path(state) / "bad_nodes").write_text("".join(f"{host}\n" for host in slow))
    raise LaunchError(
        f"pre-flight: the all-reduce over {control.world} ranks reaches {slowest:.3g} GB/s, "
        f"{floor:g} wanted; "
        + (f"slow with the first node: {', '.join(slow)}" if slow else "no node is slower than the others")
    )


def slow_nodes(bandwidths: Mapping[str, float]) -> list[str]:
    """The nodes whose bandwidth with the first node is far below that of most.

    With all of them slow none is named: then it is the first node, or the network.
    """
    if not bandwidths:
        return []
    usual = median(bandwidths.values())
    return [host for host, value in bandwidths.items() if value < SLOW_SHARE * usual]


def _by_node(control: Control) -> dict[str, float]:
    """Each other node's bandwidth with the first, between the first rank of each."""
    own = (host_name(), int(os.environ.get("LOCAL_RANK", "0")))
    leaders = [(rank, host) for rank, (host, local) in enumerate(control.all_gather(own)) if local == 0]
    found = {}
    for rank, host in leaders[1:]:
        pair = dist.new_group([0, rank])  # every rank takes part in making it
        value = _all_reduce(pair, 2) if control.rank in (0, rank) else None
        found[host] = next(v for v in control.all_gather(value) if v is not None)
    return found


def _all_reduce(group: Any, ranks: int) -> float:
    """GB/s of a large all-reduce on this rank, the first repetitions not counted."""
    cuda = torch.cuda.is_available()
    tensor = torch.ones((64 if cuda else 1) * 2**20, device="cuda" if cuda else "cpu")
    for _ in range(2):
        dist.all_reduce(tensor, group=group)
    _settle(cuda)
    begun = time.perf_counter()
    for _ in range(REPETITIONS):
        dist.all_reduce(tensor, group=group)
    _settle(cuda)
    seconds = (time.perf_counter() - begun) / REPETITIONS
    return 2 * (ranks - 1) / ranks * tensor.nbytes / seconds / 1e9


def _settle(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
