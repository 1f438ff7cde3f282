"""From a run to a job: files in its folder, then sbatch or nemo-run; and what became of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_pmd.errors import LaunchError
from megatron_pmd.launch.script import Job, render
from megatron_pmd.launch.slurm import slurm

Through = Literal["auto", "nemo-run", "sbatch"]


def submit(job: Job, *, chain: int = 1, through: Through = "auto") -> list[str]:
    """Write the run's files and submit; returns the job ids, first to last.

    chain: so many jobs, each after the one before has ended; one that finds the run complete or stopped ends
    at once. Raises LaunchError when Slurm refuses, or when the run has a job already.
    """
    folder = Path(job.run) / "launch"
    if not Path(job.root).is_dir():
        raise LaunchError(f"{job.root}: no such folder; `shared` in the profile must be seen from here too")
    running = [number for number in job_ids(Path(job.run)) if is_queued(number)]
    if running:
        raise LaunchError(f"{job.run} has a job already: {', '.join(running)}; cancel it first")
    folder.mkdir(parents=True, exist_ok=True)
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
    for link in range(1, chain):
        numbers.append(_sbatch(script, after=numbers[-1], link=link))
    (folder / "jobs").write_text("".join(f"{number}\n" for number in numbers))
    (folder / "log").write_text(f"{job.run}/logs/log-slurm-{numbers[0]}.out\n")
    return numbers


def _try(script: Path, job: Job) -> None:
    """Ask Slurm whether it could ever start the job: what it cannot would wait for ever."""
    try:
        slurm("sbatch", "--test-only", str(script))
    except LaunchError as error:
        raise LaunchError(
            f"cluster {job.cluster.name} cannot give {job.nodes} nodes of {job.ranks_per_node} ranks: {error}"
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
    """Whether a job waits or runs."""
    states = slurm("squeue", "-h", "-j", number, "-o", "%T", check=False)
    return any(
        state in states
        for state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
    )


def cancel(run: Path) -> list[str]:
    """Cancel every job of a run; returns those that were in the queue."""
    numbers = [number for number in job_ids(run) if is_queued(number)]
    if numbers:
        slurm("scancel", *reversed(numbers))  # the last of a chain first: cancelling a job starts the next
    return numbers
