"""Where a node stands in its Slurm job."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


def host_name() -> str:
    """Of this node, as Slurm calls it; else its own."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


@dataclass(frozen=True)
class Allocation:
    """Where this node stands in its job, as Slurm and the batch script tell."""

    host: str
    rank: int
    nodes: int
    ranks_per_node: int
    attempt: int
    state: Path
    """Folder runs/NAME/launch."""
    master: str
    port: int

    @classmethod
    def from_environment(cls) -> Allocation:
        env = os.environ
        return cls(
            host=host_name(),
            rank=int(env["SLURM_NODEID"]),
            nodes=int(env["SLURM_NNODES"]),
            ranks_per_node=int(env["PMD_RANKS_PER_NODE"]),
            attempt=int(env["PMD_ATTEMPT"]),
            state=Path(env["PMD_STATE"]),
            master=env["MASTER_ADDR"],
            port=int(env["MASTER_PORT"]),
        )
