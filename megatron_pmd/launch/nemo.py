"""Submission through nemo-run: its SlurmExecutor, experiment and logs around our own script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_pmd.errors import ConfigError, LaunchError
from megatron_pmd.launch.script import Job, body, exports, options

OWN = {
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
}
"""Options that SlurmExecutor takes by parameters of its own; the others go in as they are."""


def executor(job: Job) -> Any:
    """A SlurmExecutor whose script is ours.

    nemo-run puts an srun of its own around a command, and requeues what fails; `setup_lines` stand before
    both in the batch script, and ours end the job.
    """
    import nemo_run
    from nemo_run.core.execution.slurm import SlurmJobDetails

    asked = options(job)
    rest = {name.replace("-", "_"): True if value is None else value for name, value in asked.items()}
    return nemo_run.SlurmExecutor(
        account=asked.get("account"),
        partition=asked.get("partition"),
        job_name_prefix="pmd.",
        nodes=_number(asked, "nodes"),
        ntasks_per_node=_number(asked, "ntasks-per-node"),
        gpus_per_node=_number(asked, "gpus-per-node") if "gpus-per-node" in asked else None,
        gres=asked.get("gres"),
        exclusive=True if "exclusive" in asked else None,
        mem=asked["mem"],
        time=asked["time"],
        tunnel=nemo_run.LocalTunnel(job_dir=str(home(job) / "experiments")),
        packager=nemo_run.Packager(),
        # where `nemo experiment logs` looks for log*: our output is there, under that name
        job_details=SlurmJobDetails(folder=f"{job.run}/logs"),
        setup_lines="set +evx\n" + exports(job) + body(),  # nemo-run has bash echo every line
        additional_parameters={
            name: value for name, value in rest.items() if name.replace("_", "-") not in OWN
        },
    )


def _number(asked: dict[str, str | None], option: str) -> int:
    """SlurmExecutor takes no other: ConfigError for what else sbatch would."""
    value = asked[option] or ""
    if not value.isdigit():
        raise ConfigError(
            f"extra_sbatch: --{option}={value} is no number, and nemo-run takes no else: use --through sbatch"
        )
    return int(value)


def home(job: Job) -> Path:
    """nemo-run's folder, in that of the run: LocalTunnel finds its scripts only in `experiments` below it."""
    return Path(job.run) / "launch" / "nemo"


def submit_with_nemo_run(job: Job) -> str:
    """Submit and detach; returns the job's id. Raises LaunchError when nemo-run has none to show for it."""
    (home(job) / "experiments").mkdir(parents=True, exist_ok=True)
    os.environ["NEMORUN_HOME"] = str(home(job))  # read when nemo_run is imported
    import nemo_run

    never_reached = nemo_run.Script(inline="true")  # see executor()
    with nemo_run.Experiment(job.config.name, base_dir=str(home(job))) as experiment:
        experiment.add(never_reached, executor=executor(job), name=job.config.name)
        try:
            experiment.run(detach=True)
        except Exception as error:  # what a failed sbatch raises is of a library that nemo-run uses
            said = getattr(getattr(error, "result", None), "stderr", "") or str(error)
            raise LaunchError(f"nemo-run could not submit: {said.strip()}") from None
        handles = [str(getattr(each, "handle", "")) for each in experiment.jobs]
    numbers = [part for handle in handles for part in handle.split("/") if part.isdigit()]
    # with wrong options nemo-run prints the error and goes on
    if not numbers:
        raise LaunchError(f"nemo-run submitted nothing; its experiment is in {home(job)}/experiments")
    return numbers[0]
