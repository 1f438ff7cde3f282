"""Stands in for a rank: waits until it is told to save, and then ends as a run that was saved does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_pmd.node.worker import JobSpec
from megatron_pmd.observe.summary import write_summary
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.training.shutdown import Shutdown

if __name__ == "__main__":
    folder = Path(JobSpec.read(Path(sys.argv[1])).folder)
    shutdown = Shutdown()
    (folder / f"born-{os.environ['RANK']}").touch()
    shutdown.install()
    while (reason := shutdown.reason_before("update")) is None:
        time.sleep(0.01)
    (folder / f"saved-{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "0":
        write_summary(folder, RunOutcome(Status.SAVED, reason))
