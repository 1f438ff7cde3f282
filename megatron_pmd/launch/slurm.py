"""One call of a Slurm command. Python's library alone: the batch host calls it with its own Python."""

from __future__ import annotations

import shutil
import subprocess

from megatron_pmd.errors import LaunchError
from megatron_pmd.waiting import waiting_for

DEADLINE_SECONDS = 60.0
NO_SUCH_JOB = "Invalid job id specified"
"""Of a job that ended a while ago, or never was; squeue's exit code is the same when nobody answers it."""


def slurm(*command: str, deadline_seconds: float = DEADLINE_SECONDS) -> str:
    """What a Slurm command prints. Raises LaunchError in its own words when it fails, is absent, or hangs."""
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not here: run this on a login node of the cluster, or use --dry-run; "
            "in a job, Slurm's commands must be on the PATH of the batch script"
        )
    try:
        with waiting_for(f"an answer of {' '.join(command)}", deadline_seconds):
            done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_seconds)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{' '.join(command)}: no answer within {deadline_seconds:g} s") from None
    if done.returncode:
        raise LaunchError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def queue(number: str, form: str) -> str:
    """What squeue prints of a job, in this form; empty when Slurm says that it knows no such job.

    Raises LaunchError when it says nothing: then nobody knows whether the job is there.
    """
    try:
        return slurm("squeue", "-h", "-t", "all", "-j", number, "-o", form)
    except LaunchError as error:
        if NO_SUCH_JOB in str(error):
            return ""
        raise LaunchError(f"whether there is a job {number} is not known: {error}") from None
