"""Starting the actor ranks of a node: what `torchrun` does, with an error a person can read."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from megatron_pmd import errors, network
from megatron_pmd.config import RunConfig, StopAfter
from megatron_pmd.errors import DamagedCheckpoint, DataError, Interrupted
from megatron_pmd.files import full_disk
from megatron_pmd.lock import locked
from megatron_pmd.node import worker
from megatron_pmd.node.engine_node import engine_nodes_here
from megatron_pmd.node.inputs import check_inputs
from megatron_pmd.node.watch import ending_ranks_that_stand_still
from megatron_pmd.node.worker import JobSpec
from megatron_pmd.observe.summary import outcome_of, write_summary
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import SAVE, beside
from megatron_pmd.shared_memory import PREFIX, SHARED_MEMORY, own_memory, shared_memory_key

LISTENING_SECONDS = 0.2
ASKED_TO_END = ("SIGTERM", "SIGINT")
"""Signals by which a user or Slurm ends a run: nothing has failed."""
LOCK = "lock"
"""In a run's folder: held by the process that trains it, on the first node."""
ENDING_SECONDS = 120.0
"""For an attempt whose node is lost: the file server forgets its lock after a while, 90 s with NFS 4."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, and which of them this is."""

    count: int
    rank: int
    ranks_per_node: int
    rendezvous: str
    """address:port on the job's first node, where torch's agents meet, and the ranks."""
    attempt: int | None = None
    """Which start of the run this is; each has logs of its own. None: not counted."""


def run_here(
    config: RunConfig, folder: Path, *, replay: Path | None = None, stop_after: StopAfter | None = None
) -> RunOutcome:
    """Train on this machine alone, maybe with servers elsewhere, and with its engine nodes; see run_ranks.

    A checkpoint that proves damaged while it is loaded is set aside, and the ranks start again from the one
    before. On Slurm the job does.
    """
    interface = network.loopback()
    if config.rollout.servers and config.sync.transport == "broadcast":
        interface = network.choose_interface((), urlsplit(config.rollout.servers[0]).hostname or "")
    os.environ.update(network.variables(interface))
    nodes = Nodes(1, 0, config.layout.ranks, f"{interface.address}:0")
    while True:
        with engine_nodes_here(config, folder) if replay is None else nullcontext():
            outcome = run_ranks(config, folder, nodes, replay=replay, stop_after=stop_after)
        if outcome.error != DamagedCheckpoint.__name__:
            return outcome
        print(outcome.reason, file=sys.stderr, flush=True)


def run_ranks(
    config: RunConfig,
    folder: Path,
    nodes: Nodes,
    *,
    replay: Path | None = None,
    stop_after: StopAfter | None = None,
) -> RunOutcome:
    """Run this node's ranks, one process each, until all have ended; every node of the job calls this.

    On a CPU they are forked from this process, which imports for them; on a GPU each imports for itself.
    The first rank of the node writes to this terminal, the others to folder/logs. The outcome is the run's
    own, or that of the rank that failed first, in its words; it is also in the run's summary.json. Raises
    what is wrong with the user's files, and LaunchError when the run is being trained already.
    """
    if nodes.rank:
        return _run_ranks(config, folder, nodes, replay, stop_after)
    with locked(
        folder / LOCK,
        f"{folder} is being trained",
        way_out="wait for it, end it, or give this run another name",
        patience_seconds=ENDING_SECONDS if nodes.attempt else 0.0,
    ):
        check_inputs(config, replay)
        return _run_ranks(config, folder, nodes, replay, stop_after)


def _run_ranks(
    config: RunConfig, folder: Path, nodes: Nodes, replay: Path | None, stop_after: StopAfter | None
) -> RunOutcome:
    # the agent's own account of a failure is longer than the failure, which is shown below
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logs = folder / "logs" / (f"attempt-{nodes.attempt}" if nodes.attempt else "")
    logs.mkdir(parents=True, exist_ok=True)
    key = shared_memory_key(folder)
    spec = JobSpec(
        config=config.model_dump(mode="json"),
        folder=str(folder),
        # in memory: a run that ends because its disk is full must be able to say so
        outcomes=str(SHARED_MEMORY / f"{PREFIX}{key}-outcome-{nodes.rank}"),
        heartbeats=own_memory("heartbeat", nodes.ranks_per_node),
        stacks=own_memory("stacks", nodes.ranks_per_node),
        replay=str(replay.resolve()) if replay else None,
        stop_after=stop_after,
    )
    for local_rank in range(nodes.ranks_per_node):
        spec.outcome_file(local_rank).unlink(missing_ok=True)  # of a start that was killed
    os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(config, nodes))
    # New memory in pages of 2 MB: making small ones takes much of a save's stall. torch reads this at its
    # first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    start_method = "spawn" if torch.cuda.is_available() else "fork"
    try:
        if start_method == "fork":
            worker.import_what_ranks_need()
        first_rank = nodes.rank * nodes.ranks_per_node
        with _passing_on_the_signal_to_save(), ending_ranks_that_stand_still(spec, first_rank):
            elastic_launch(_launch_config(config, nodes, logs, start_method), worker.run_rank)(spec)
    except ChildFailedError as failed:
        return _ended(folder, nodes, _of_first_failure(failed, spec, logs, nodes))
    except (KeyboardInterrupt, SignalException):
        reason = f"{folder}: interrupted; the same command resumes it from its last checkpoint"
        return _ended(folder, nodes, RunOutcome.of(Interrupted(reason)))
    finally:
        # a rank that was killed could not remove its weight buckets
        for bucket in SHARED_MEMORY.glob(f"{PREFIX}{key}-*"):
            bucket.unlink(missing_ok=True)
    return outcome_of(folder) or RunOutcome(Status.FAILED, f"{folder}: the ranks ended without a summary")


def threads_per_rank(config: RunConfig, nodes: Nodes) -> int:
    """OpenMP threads: of the rank's share of the node's cores where they step the optimizer, else few.

    With optimizer.offload megatron-core steps torch's AdamW on the host (HybridDeviceOptimizer).
    """
    if not config.optimizer.offload:
        return config.actor.threads_per_rank
    return max(1, len(os.sched_getaffinity(0)) // nodes.ranks_per_node)


def _passing_on_the_signal_to_save() -> AbstractContextManager[None]:
    """Send SIGUSR1, which this process holds back (processes.hold_back), on to its ranks while they run.

    Where Slurm tracks processes by cgroup it signals the direct child of its step alone. It may come before
    the ranks do: then each gets it when it starts.
    """

    def pass_on(ended: threading.Event) -> None:
        asked, told = False, set()
        while not ended.wait(LISTENING_SECONDS):
            # not sigtimedwait: CPython 3.12's returns a signal that never came when Ctrl-Z has stopped it
            asked |= SAVE in signal.sigpending()
            for child in psutil.Process().children() if asked else ():
                if child.pid not in told:
                    with suppress(psutil.NoSuchProcess):
                        child.send_signal(SAVE)
                    told.add(child.pid)

    return beside(pass_on, "signal-to-save")


def _launch_config(config: RunConfig, nodes: Nodes, logs: Path, start_method: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    from megatron_pmd.node.rendezvous import BACKEND

    class LogsOfThisNode(DefaultLogsSpecs):
        """In a folder whose name says so; torch's own makes one more, of a random name, at each start."""

        def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
            return str(logs / f"ranks-of-node-{nodes.rank}")

    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=nodes.ranks_per_node,
        rdzv_backend=BACKEND,
        rdzv_endpoint=nodes.rendezvous,
        rdzv_configs={"rank": nodes.rank},
        run_id=f"{config.name}-{nodes.attempt}",
        start_method=start_method,
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=LogsOfThisNode(
            log_dir=str(logs), redirects=dict.fromkeys(range(1, nodes.ranks_per_node), Std.ALL)
        ),
    )


def _of_first_failure(failed: Any, spec: JobSpec, logs: Path, nodes: Nodes) -> RunOutcome:
    """What the rank that failed first has noted, or how the system ended it."""
    # torch's account has no times: one that was killed, and could note nothing, is the reason of the others.
    # It may lack a rank that node/watch.py has ended, if the others met its end before torch did.
    first_rank = nodes.rank * nodes.ranks_per_node
    files = {first_rank + local: spec.outcome_file(local) for local in range(nodes.ranks_per_node)}
    noted = {rank: files[rank] for rank in files if rank in failed.failures or files[rank].exists()}
    rank = min(noted, key=lambda rank: noted[rank].stat().st_mtime_ns if noted[rank].exists() else 0)
    outcome = RunOutcome.read(noted[rank]) or _of_the_system(rank, failed.failures[rank])
    # A PmdError of one rank is raised on all (Control.on_driver), and any can be the first to end.
    who = "" if hasattr(errors, outcome.error or "") else f"rank {rank} failed: "
    full = full_disk(Path(spec.folder))
    return replace(outcome, reason=f"{who}{outcome.reason}{full}; logs: {logs}")


def _of_the_system(rank: int, failure: Any) -> RunOutcome:
    """How a rank ended that could note nothing."""
    if failure.signal_name() in ASKED_TO_END:
        # Slurm's signal may reach a rank before the agent, which would have said the same
        return RunOutcome.of(Interrupted(f"rank {rank} was ended by {failure.signal_name()}"))
    how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return RunOutcome(Status.FAILED, f"it ended with {how}")


def _ended(folder: Path, nodes: Nodes, outcome: RunOutcome) -> RunOutcome:
    """A rank that was killed, or that only met another's failure, has left no summary, or its own view."""
    if nodes.rank == 0:
        with suppress(DataError, OSError):  # it ended before there was a run; its disk is full
            write_summary(folder, outcome)
    return outcome
