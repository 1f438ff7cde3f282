"""How a rollout gets from the driver to the ranks: each has the tokens that it trains on, and no others.

The ranks of a node have theirs in one file in shared memory: the ranks of a data-parallel replica map one
section of it. The driver packs straight into the file of its own node; for other nodes it packs one section
at a time and sends it as it lies in memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.distributed import Control
from megatron_pmd.errors import LaunchError
from megatron_pmd.shared_memory import SHARED_MEMORY, nameless_file, path_to

Share = tuple[int, ...]
"""The samples whose tokens a rank needs, ascending."""


@dataclass(frozen=True)
class NodeFile:
    """What a node's file holds.

    leader    the rank that makes the file and fills it: the node's first
    sections  share -> (first byte, bytes)
    nbytes    of the file
    """

    leader: int
    sections: dict[Share, tuple[int, int]]
    nbytes: int


def distribute(
    described: RolloutBatch | None,
    samples: Sequence[Sample],
    needed: Callable[[RolloutBatch], np.ndarray],
    control: Control,
    *,
    say: Callable[[str], Any] = print,
    memory: Path = SHARED_MEMORY,
) -> RolloutBatch:
    """The batch with the tokens of this rank's share; collective.

    described  on the driver: RolloutBatch.describe of the samples
    samples    on the driver: all of them, in that order
    needed     from what is known of every sample to the samples whose tokens this rank trains on
    memory     where a node's file is to be; where it is too small, the file is in the folder for temporary
               files, and the driver says so

    A node's file is there until the last of its ranks has dropped its batch. Raises LaunchError on all ranks
    if a node has room for it nowhere.
    """
    batch: RolloutBatch = control.from_driver(described)
    own: Share = tuple(np.unique(needed(batch)).tolist())
    files = plan(batch, control.all_gather((control.node, own)))
    mine = files[control.node]
    file: IO[bytes] | None = None

    def make_file() -> tuple[Path, Path] | None:
        nonlocal file
        if mine.leader != control.rank:
            return None
        file, folder = nameless_file(mine.nbytes, [memory, Path(tempfile.gettempdir())])
        return path_to(file.fileno()), folder

    places: list[Any] = control.on_all(make_file)
    if control.is_driver:
        _tell_of_other_folders(files, places, memory, say)
    if file is not None:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), mine.nbytes), dtype=torch.uint8)
        if control.is_driver:
            _pack(batch, samples, files, whole, control)
        else:
            for offset, nbytes in mine.sections.values():
                control.receive_bytes(whole[offset : offset + nbytes], 0)
        del whole
    control.barrier()
    path, _ = places[mine.leader]
    share: RolloutBatch | None = None

    def map_section() -> None:
        nonlocal share
        share = _mapped(batch, own, path, *mine.sections[own])

    control.on_all(map_section)
    if file is not None:
        file.close()  # not before all ranks have opened it: it has no name to find it by
    assert share is not None
    return share


def _tell_of_other_folders(
    files: dict[int, NodeFile], places: list[Any], memory: Path, say: Callable[[str], Any]
) -> None:
    for node, file in files.items():
        _, folder = places[file.leader]
        if folder != memory:
            say(
                f"{memory} of node {node} has no room for {file.nbytes:,} bytes of the batch; they are in "
                f"{folder}, which may be slower"
            )


def plan(batch: RolloutBatch, requests: list[tuple[int, Share]]) -> dict[int, NodeFile]:
    """Every node's file. requests: each rank's node and share, in rank order."""
    nodes = [node for node, _ in requests]
    files: dict[int, NodeFile] = {}
    for node in dict.fromkeys(nodes):
        sections, end = {}, 0
        # in one order everywhere: the driver packs a share once, and sends it to every node that needs it
        for share in sorted({share for needing, share in requests if needing == node}):
            nbytes = batch.share_bytes(np.array(share, np.int64))
            sections[share] = end, nbytes
            # a map begins at a page's beginning, and cannot be of nothing
            end += -(-max(nbytes, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        files[node] = NodeFile(nodes.index(node), sections, end)
    return files


def _pack(
    batch: RolloutBatch,
    samples: Sequence[Sample],
    files: dict[int, NodeFile],
    memory: torch.Tensor,
    control: Control,
) -> None:
    """The driver's part: every share, packed once, into its node's memory and to the other leaders."""
    mine = files[control.node]
    for share in sorted({share for file in files.values() for share in file.sections}):
        numbers = np.array(share, np.int64)
        if share in mine.sections:
            offset, nbytes = mine.sections[share]
            section = memory[offset : offset + nbytes]
        else:
            section = torch.empty(batch.share_bytes(numbers), dtype=torch.uint8)
        batch.share(numbers, section.numpy()).fill(samples)
        for file in files.values():
            if file is not mine and share in file.sections:
                control.send_bytes(section, file.leader)


def _mapped(batch: RolloutBatch, own: Share, path: Path, offset: int, nbytes: int) -> RolloutBatch:
    """The batch with this rank's section of its node's file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # a page that this rank writes to becomes its own, so that none can change another's tokens
            section = mmap.mmap(descriptor, max(nbytes, 1), access=mmap.ACCESS_COPY, offset=offset)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"{path}, where a node's part of the batch is, cannot be mapped: {error}; the ranks of a node "
            "need one user and one /proc"
        ) from None
    return batch.share(np.array(own, np.int64), np.frombuffer(section, np.uint8))
