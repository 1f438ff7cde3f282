"""Submission through nemo-run: its SlurmExecutor, experiment and logs around our own script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_pmd.errors import LaunchError
from megatron_pmd.launch.script import Job, body, exports, options

OWN = (
    "job-name",
    "account",
    "partition",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "gres",
    "exclusive",
    "mem",
    "time",
)
"""Options that SlurmExecutor has parameters for; the others go in as they are."""


def executor(job: Job) -> Any:
    """A SlurmExecutor whose script is ours.

    nemo-run puts an srun of its own around a command, with its own rendezvous on a fixed port and its own
    requeueing; `setup_lines` stand before it in the batch script, and ours end the job.
    """
    import nemo_run

    asked = options(job)
    experiments = Path(job.run) / "launch" / "experiments"
    experiments.mkdir(parents=True, exist_ok=True)
    rest = {
        name.replace("-", "_"): value
        for name, value in asked.items()
        if name not in OWN and value is not None
    }
    rest.pop("output")  # nemo-run looks for its own
    return nemo_run.SlurmExecutor(
        account=asked.get("account"),
        partition=asked.get("partition"),
        job_name_prefix="pmd.",
        nodes=job.nodes,
        ntasks_per_node=1,
        gpus_per_node=job.ranks_per_node if "gpus-per-node" in asked else None,
        gres=asked.get("gres"),
        exclusive="exclusive" in asked,
        mem="0",
        time=job.cluster.time,
        tunnel=nemo_run.LocalTunnel(job_dir=str(experiments)),
        packager=nemo_run.Packager(),
        setup_lines=exports(job) + body(),
        additional_parameters=rest,
    )


def submit_with_nemo_run(job: Job) -> str:
    """Submit and detach; returns the job's id. Raises LaunchError when nemo-run has none to show for it."""
    # experiments are looked up below this folder; it is read when nemo_run is imported
    os.environ["NEMORUN_HOME"] = str(Path(job.run) / "launch")
    import nemo_run

    task = nemo_run.Script(inline="true")  # never reached: see executor()
    with nemo_run.Experiment(job.config.name, base_dir=str(Path(job.run) / "launch")) as experiment:
        experiment.add(task, executor=executor(job), name=job.config.name)
        experiment.run(detach=True)
    handles = [handle for each in experiment.jobs if (handle := getattr(each, "handle", ""))]
    number = handles[0].rpartition("/")[2] if handles else ""
    number = next((part for part in handles[0].split("/") if part.isdigit()), number) if handles else number
    if not number.isdigit():
        raise LaunchError(f"nemo-run submitted nothing; its experiment is in {job.run}/launch/experiments")
    return number
