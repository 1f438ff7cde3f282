"""The ranks of a conversion: those torchrun started, or this process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megatron_pmd import network

TIMEOUT_SECONDS = timedelta(days=1).total_seconds()
"""A rank with small parts waits this long for one with large ones."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@contextmanager
def ranks() -> Iterator[Any]:
    """Join the other ranks; yields their Control. No rank holds a part of another's parameters."""
    from megatron_pmd.processes import cores_of_rank, quiet

    quiet()
    # RANK and WORLD_SIZE alone may be left of another program, and the ranks that they speak of exist no more
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ.update(ALONE | network.variables(network.loopback()))
    import torch

    from megatron_pmd.actor.cpu import standins

    standins.install()  # nothing where CUDA exists
    from megatron_pmd.actor import parallel
    from megatron_pmd.config import Layout
    from megatron_pmd.distributed import Control

    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        torch.set_num_threads(cores_of_rank())
    parallel.initialize(Layout(data=world), seed=0, timeout_seconds=TIMEOUT_SECONDS)
    try:
        yield Control(TIMEOUT_SECONDS)
    finally:
        torch.distributed.destroy_process_group()
