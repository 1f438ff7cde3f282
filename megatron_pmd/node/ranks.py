"""Starting the actor ranks of a node: what `torchrun` does, with an error a person can read."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_pmd.config import RunConfig, StopAfter
from megatron_pmd.errors import Interrupted, PmdError
from megatron_pmd.node.worker import Order
from megatron_pmd.shared_memory import SHARED_MEMORY, shared_memory_key


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, and which of them this is."""

    count: int
    rank: int
    ranks_per_node: int
    rendezvous: str
    """host:port on the job's first node, where torch's agents meet."""
    attempt: int | None = None
    """Which start of the run this is; each has logs of its own. None: not counted."""
    address: str | None = None
    """This node's, on the interface that the ranks talk over; None: its host name's."""


def run_here(
    config: RunConfig, folder: Path, *, replay: Path | None = None, stop_after: StopAfter | None = None
) -> None:
    """Train on this machine alone; see run_ranks."""
    nodes = Nodes(1, 0, config.layout.ranks, "localhost:0")
    run_ranks(config, folder, nodes, replay=replay, stop_after=stop_after)


def run_ranks(
    config: RunConfig,
    folder: Path,
    nodes: Nodes,
    *,
    replay: Path | None = None,
    stop_after: StopAfter | None = None,
) -> None:
    """Run this node's ranks, one process each, until all have ended; every node of the job calls this.

    The first rank of the node writes to this terminal, the others to folder/logs. Raises PmdError with the
    failing rank's own words, Interrupted after Ctrl-C or SIGTERM.
    """
    # the agent's own account of a failure is longer than the failure, which is shown below
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = folder / "logs" / (f"attempt-{nodes.attempt}" if nodes.attempt else "")
    logs.mkdir(parents=True, exist_ok=True)
    order = logs / f"order-{nodes.rank}.json"
    Order(
        config=config.model_dump(mode="json"),
        folder=str(folder),
        replay=str(replay.resolve()) if replay else None,
        stop_after=stop_after,
    ).write(order)
    os.environ["OMP_NUM_THREADS"] = str(config.actor.threads_per_rank)
    launch = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=nodes.ranks_per_node,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.rendezvous,
        run_id=f"{config.name}-{nodes.attempt}",
        max_restarts=0,
        monitor_interval=0.2,
        local_addr=nodes.address,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects=dict.fromkeys(range(1, nodes.ranks_per_node), Std.ALL)
        ),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "megatron_pmd.node.worker", str(order))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise PmdError(_reason(rank, failure.message, folder)) from None
    except (KeyboardInterrupt, SignalException):
        raise Interrupted(
            f"{folder}: interrupted; the same command resumes it from its last checkpoint"
        ) from None
    finally:
        # a rank that was killed could not remove its weight buckets
        for bucket in SHARED_MEMORY.glob(f"megatron-pmd-{shared_memory_key(folder)}-*"):
            bucket.unlink(missing_ok=True)


def _reason(rank: int, message: object, folder: Path) -> str:
    """The failing rank's error, without torch's envelope."""
    text = message["message"] if isinstance(message, dict) else str(message)
    if isinstance(text, str) and text.startswith("{"):
        text = json.loads(text).get("message", text)
    return f"rank {rank} failed: {text}; logs: {folder / 'logs'}"
