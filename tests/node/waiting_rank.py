"""Stands in for a rank: waits until it is told to save, and then ends as a run that was saved does."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_pmd.node.worker import JobSpec
from megatron_pmd.observe.summary import SUMMARY
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import die_with_parent
from megatron_pmd.training.shutdown import Shutdown


def wait(spec: JobSpec) -> None:
    """In the place of node/worker.py's run_rank."""
    die_with_parent(parent=os.getppid())
    folder = Path(spec.folder)
    shutdown = Shutdown()
    shutdown.install()
    while (reason := shutdown.reason_before("update")) is None:
        time.sleep(0.01)
    (folder / f"saved-{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "0":
        RunOutcome(Status.SAVED, reason).write(folder / SUMMARY)
