"""Starting the actor ranks of one machine: what `torchrun` does, with an error a person can read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_pmd.config import RunConfig, StopAfter
from megatron_pmd.errors import Interrupted, PmdError
from megatron_pmd.weight_sync.bucket import SHARED_MEMORY
from megatron_pmd.weight_sync.push import shared_memory_key
from megatron_pmd.worker import Order


def run_here(
    config: RunConfig, folder: Path, *, replay: Path | None = None, stop_after: StopAfter | None = None
) -> None:
    """Train on this machine, one process a rank, until all have ended.

    The driver writes to this terminal, the others to folder/logs. Raises PmdError with the failing rank's own
    words, Interrupted after Ctrl-C or SIGTERM.
    """
    # the agent's own account of a failure is longer than the failure, which is shown below
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    (folder / "logs").mkdir(parents=True, exist_ok=True)
    order = folder / "logs" / "order.json"
    Order(
        config=config.model_dump(mode="json"),
        folder=str(folder),
        replay=str(replay.resolve()) if replay else None,
        stop_after=stop_after,
    ).write(order)
    os.environ["OMP_NUM_THREADS"] = str(config.actor.threads_per_rank)
    ranks = config.layout.ranks
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=config.name,
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(folder / "logs"), redirects=dict.fromkeys(range(1, ranks), Std.ALL)
        ),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "megatron_pmd.worker", str(order))
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


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Whether this very configuration has been trained to its end in this folder."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        recorded = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return summary["status"] == "complete" and recorded == config.model_dump(mode="json")


def _reason(rank: int, message: object, folder: Path) -> str:
    """The failing rank's error, without torch's envelope."""
    text = message["message"] if isinstance(message, dict) else str(message)
    if isinstance(text, str) and text.startswith("{"):
        text = json.loads(text).get("message", text)
    return f"rank {rank} failed: {text}; logs: {folder / 'logs'}"
