"""One call of a Slurm command. Python's library alone: the batch host calls it with its own Python."""

from __future__ import annotations

import shutil
import subprocess

from megatron_pmd.errors import LaunchError

DEADLINE_SECONDS = 60.0


def slurm(*command: str, check: bool = True, deadline_seconds: float = DEADLINE_SECONDS) -> str:
    """What a Slurm command prints. Raises LaunchError in its own words when it fails, is absent, or hangs."""
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not here: run this on a login node of the cluster, or use --dry-run; "
            "in a job, Slurm's commands must be on the PATH of the batch script"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_seconds)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{' '.join(command)}: no answer within {deadline_seconds:g} s") from None
    if check and done.returncode:
        raise LaunchError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
