"""From a run to a job: files in its folder, then sbatch or nemo-run; and what became of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_pmd.errors import LaunchError
from megatron_pmd.launch.script import Job, render
from megatron_pmd.launch.slurm import queue, slurm
from megatron_pmd.lock import locked

LIVING = (
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
    "STAGE_OUT", "REQUEUE", "SPECIAL_EXIT",
)  # fmt: skip
"""What squeue says of a job that is to come or not at its end."""
Through = Literal["auto", "nemo-run", "sbatch"]

INHERITED = re.compile(
    r"HOME|USER|LOGNAME|SHELL|PATH|LD_LIBRARY_PATH|LANG|LC_\w+|TZ|KRB5CCNAME"
    # so that `module load` in a profile's setup works; not the list of what is loaded here
    r"|BASH_ENV|BASH_FUNC_\w+%%|MODULEPATH|MODULESHOME|MODULES_CMD|LMOD_(CMD|DIR|PKG|ROOT)"
    # what Slurm's commands themselves go by; not SBATCH_*, which sbatch lets win over the profile
    r"|SLURM_CONF|SLURM_CLUSTERS|SLURM_JWT"
)
"""Names of variables that a job gets from whoever submits it."""


def submit(job: Job, *, chain: int = 1, through: Through = "auto") -> list[str]:
    """Write the run's files and submit; returns the job ids, first to last.

    chain: so many jobs, each after the one before has ended; one that finds the run complete or stopped ends
    at once. Raises LaunchError when Slurm refuses or does not answer, or when the run has a job already.
    """
    folder = Path(job.run) / "launch"
    if not Path(job.root).is_dir():
        raise LaunchError(f"{job.root}: no such folder; `shared` in the profile must be seen from here too")
    with locked(folder / "lock", f"{job.run} is being submitted", way_out="wait for it"):
        running = [number for number in job_ids(Path(job.run)) if is_queued(number)]
        if running:
            raise LaunchError(f"{job.run} has a job already: {', '.join(running)}; cancel it first")
        forget_the_callers_environment()
        return _submit(job, folder, chain, through)


def _submit(job: Job, folder: Path, chain: int, through: Through) -> list[str]:
    (Path(job.run) / "logs").mkdir(exist_ok=True)
    excluded = folder / "excluded_nodes"
    if excluded.exists():
        job = replace(job, excluded_nodes=tuple(excluded.read_text().split()))
    (folder / "config.json").write_text(json.dumps(job.config.model_dump(mode="json"), indent=2) + "\n")
    script = folder / "train.sbatch"
    script.write_text(render(job))
    _try(script, job)
    if through == "auto":
        through = "nemo-run" if importlib.util.find_spec("nemo_run") else "sbatch"
    if through == "nemo-run":
        from megatron_pmd.launch.nemo import submit_with_nemo_run

        numbers = [submit_with_nemo_run(job)]
    else:
        numbers = [_sbatch(script)]
    _note_jobs(folder, numbers)
    (folder / "log").write_text(f"{job.run}/logs/log-slurm-{numbers[0]}.out\n")
    for link in range(1, chain):
        try:
            numbers.append(_sbatch(script, after=numbers[-1], link=link))
        except LaunchError as error:
            raise LaunchError(
                f"{link} of {chain} jobs are submitted ({', '.join(numbers)}), and not the next: {error}"
            ) from error
        _note_jobs(folder, numbers)
    return numbers


def _note_jobs(folder: Path, numbers: list[str]) -> None:
    (folder / "jobs").write_text("".join(f"{number}\n" for number in numbers))


def forget_the_callers_environment() -> None:
    """Leave in this process's environment what a job may inherit, alone: sbatch passes all of it on.

    Credentials of a shell have no place in a job that Slurm keeps on disk and shows on its nodes; SLURM_* of
    an allocation that this runs in speak of other nodes. What a job needs more stands in the profile, under
    [environment] and setup. nemo-run calls sbatch itself, so the process is where to do it.
    """
    for name in list(os.environ):
        if not INHERITED.fullmatch(name):
            del os.environ[name]


def _try(script: Path, job: Job) -> None:
    """Ask Slurm whether it could ever start the job: what it cannot would wait for ever."""
    try:
        slurm("sbatch", "--test-only", str(script))
    except LaunchError as error:
        left_out = ""
        if job.excluded_nodes:
            file, names = f"{job.run}/launch/excluded_nodes", " ".join(job.excluded_nodes)
            left_out = f"; {file} leaves out {names}: delete the lines of those that are well"
        raise LaunchError(
            f"cluster {job.cluster.name} cannot give {job.nodes} nodes of {job.ranks_per_node} ranks: "
            f"{error}{left_out}"
        ) from None


def _sbatch(script: Path, after: str | None = None, link: int = 0) -> str:
    command = ["sbatch", "--parsable"]
    if after:
        # without kill-on-invalid-dep a job whose condition can no longer hold stays pending for ever
        command += [
            f"--dependency=afterany:{after}",
            "--kill-on-invalid-dep=yes",
            f"--export=ALL,PMD_CHAIN_LINK={link}",
        ]
    number = slurm(*command, str(script)).partition(";")[0]
    if not number.isdigit():
        raise LaunchError(f"sbatch answered {number!r}, not a job id")
    return number


def job_ids(run: Path) -> list[str]:
    """The jobs that were submitted last for a run."""
    path = run / "launch" / "jobs"
    return path.read_text().split() if path.exists() else []


def is_queued(number: str) -> bool:
    """Whether a job waits or runs. Raises LaunchError when Slurm does not say."""
    state = queue(number, "%T")
    return any(living in state for living in LIVING)


def cancel(run: Path) -> list[str]:
    """Cancel every job of a run; returns those that were in the queue. LaunchError: Slurm does not say."""
    numbers = [number for number in job_ids(run) if is_queued(number)]
    if numbers:
        slurm("scancel", *reversed(numbers))  # the last of a chain first: cancelling a job starts the next
    return numbers
