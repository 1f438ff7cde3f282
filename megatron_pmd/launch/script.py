"""The batch script of a run: options and variables from the configuration and the profile, then the one body.

The body is slurm/train.sbatch from its dividing line on; nemo-run's script gets the same (nemo.py).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.placement import check_parts, devices_of_node, ranks_of_node
from megatron_pmd.errors import ConfigError, LayoutError
from megatron_pmd.launch.cluster import SLURM_FILES, Cluster

TEMPLATE = SLURM_FILES / "train.sbatch"
DIVIDING_LINE = "# --- from here on"


@dataclass(frozen=True)
class Job:
    """One submission."""

    config: RunConfig
    cluster: Cluster
    root: PurePosixPath
    """The shared folder, absolute: repository, models/, data/, runs/."""
    replay: str | None = None
    excluded_nodes: tuple[str, ...] = ()

    @property
    def run(self) -> PurePosixPath:
        return self.root / "runs" / self.config.name

    @property
    def ranks_per_node(self) -> int:
        """As many as the node's GPUs hold, with their separate engines. LayoutError if they hold none."""
        if self.cluster.has_gpus:
            return ranks_of_node(self.config, self.cluster.gpus_per_node)
        return min(self.cluster.gpus_per_node, self.config.layout.ranks)

    @property
    def gpus_per_node(self) -> int:
        """Of its ranks, and of separate engines; of an engine node if it has more."""
        return max(devices_of_node(self.config, self.ranks_per_node), self.config.devices_per_engine_node)

    @property
    def rank_nodes(self) -> int:
        return self.config.layout.ranks // self.ranks_per_node

    @property
    def nodes(self) -> int:
        """With those that have engines alone."""
        return self.rank_nodes + self.engine_nodes

    @property
    def engine_nodes(self) -> int:
        """None where rollouts are replayed."""
        return 0 if self.replay else self.config.layout.engine_nodes


def job_for(config: RunConfig, cluster: Cluster, root: PurePosixPath, replay: str | None = None) -> Job:
    """The job of a run. Raises LayoutError when its ranks do not fill nodes, or its engines fit none."""
    job = Job(config, cluster, root, replay)
    if config.layout.ranks % job.ranks_per_node:
        raise LayoutError(
            f"{config.layout.ranks} ranks do not fill nodes of {cluster.gpus_per_node} "
            f"(gpus_per_node of cluster {cluster.name}); change layout.data"
        )
    check_parts(config.layout.ranks, job.ranks_per_node, config.ranks_per_engine, config.devices_per_engine)
    mounts = [mount.split(":")[1] for mount in cluster.container.mounts if ":" in mount]
    inside = any(root == PurePosixPath(m) or PurePosixPath(m) in root.parents for m in mounts)
    if cluster.container.runtime != "none" and not inside:
        raise ConfigError(
            f"cluster {cluster.name}: the shared folder {root} is under none of container.mounts' targets "
            f"({', '.join(mounts) or 'there are none'})"
        )
    return job


def options(job: Job) -> dict[str, str | None]:
    """sbatch's options by long name; None for one without a value."""
    cluster = job.cluster
    gpus = (
        {"gres": f"{cluster.gres}:{job.gpus_per_node}"}
        if cluster.gres
        else {"gpus-per-node": str(job.gpus_per_node)}
    )
    found: dict[str, str | None] = {
        "job-name": job.config.name,
        **{
            name: value
            for name in ("account", "partition", "qos", "constraint")
            if (value := getattr(cluster, name))
        },
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cluster.cpus_per_node),
        **(gpus if cluster.has_gpus else {}),
        **({"exclusive": None} if cluster.exclusive else {}),
        "mem": "0",
        "time": cluster.time,
        "requeue": None,
        **({"no-kill": None} if job.engine_nodes else {}),
        "open-mode": "append",
        "signal": f"USR1@{cluster.signal_seconds}",
        "output": f"{str(job.run).replace('%', '%%')}/logs/log-slurm-%j.out",
    }
    found |= cluster.extra_options
    if job.excluded_nodes:
        found["exclude"] = ",".join([*filter(None, [found.get("exclude")]), *job.excluded_nodes])
    return found


def variables(job: Job) -> dict[str, str]:
    """The environment that the body reads, and what the profile sets for all processes."""
    cluster, container = job.cluster, job.cluster.container
    own = {
        "PMD_RECIPE": f"{job.run}/launch/config.json",
        "PMD_NAME": job.config.name,
        "PMD_RUNS": f"{job.root}/runs",
        "PMD_ROOT": str(job.root),
        "PMD_PYTHON": cluster.python,
        "PMD_HOST_PYTHON": cluster.host_python,
        "PMD_RANKS_PER_NODE": str(job.ranks_per_node),
        "PMD_GPU": cluster.gpu,
        "PMD_SETUP": " && ".join(cluster.setup) or "true",
        "PMD_MAX_ATTEMPTS": str(cluster.max_attempts),
        "PMD_MAX_CRASHES": str(cluster.max_crashes),
        "PMD_INTERFACES": " ".join(cluster.network.socket_interfaces),
        "PMD_PREFLIGHT": cluster.preflight.model_dump_json(exclude_defaults=True),
        "PMD_CONTAINER_RUNTIME": container.runtime,
        "PMD_CONTAINER_IMAGE": container.image or "",
        "PMD_CONTAINER_MOUNTS": ",".join(container.mounts),
        "PMD_SCRATCH": cluster.scratch or "",
        "PMD_REPLAY": job.replay or "",
        # a requeue says anew which nodes it is to leave out
        "PMD_EXCLUDED_NODES": cluster.extra_options.get("exclude") or "",
    }
    if job.engine_nodes:
        own |= {
            "PMD_RANK_NODES": str(job.rank_nodes),
            "PMD_ENGINE_NODES": str(job.engine_nodes),
            "PMD_JOB_NODES": str(job.nodes),
        }
    return own | cluster.network.environment | cluster.environment


def exports(job: Job) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables(job).items() if value)


def body() -> str:
    """What becomes of the job, and what every node runs."""
    text = TEMPLATE.read_text()
    return text[text.index(DIVIDING_LINE) :]


def render(job: Job) -> str:
    """The whole script for sbatch."""
    # sbatch reads a line as a shell does: it ends a value at a space, and the line at a #
    header = "".join(
        f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}") + "\n"
        for name, value in options(job).items()
    )
    return f"#!/bin/bash\n{header}\n{exports(job)}\n{body()}"
