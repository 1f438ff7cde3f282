"""Cluster profiles: what a Slurm cluster is like, in one validated TOML file. Imports no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from megatron_pmd.config import Frozen, explain
from megatron_pmd.errors import ConfigError
from megatron_pmd.planner.hardware import DEVICES, Machines
from megatron_pmd.plugins import did_you_mean

SLURM_FILES = Path(__file__).with_name("slurm")
"""In a checkout a link to the folder slurm/ at the root; in an installed package its files."""
PROFILES = SLURM_FILES / "clusters"

VariableName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
"""Of the environment; nemo-run writes them in upper case, so others would differ between the two ways."""


class Container(Frozen):
    runtime: Literal["pyxis", "apptainer", "none"] = "none"
    image: str | None = None
    """pyxis: a .sqsh file or a registry address; apptainer: a .sif file."""
    mounts: list[str] = []
    """`source:target`, source on the node; the shared folder must be among them."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.runtime != "none" and not self.image:
            raise ConfigError(f"container.runtime={self.runtime} needs container.image")
        if self.runtime == "none" and (self.image or self.mounts):
            raise ConfigError(
                "container.image and container.mounts need container.runtime=pyxis or apptainer"
            )
        return self


class Network(Frozen):
    socket_interfaces: list[str] = []
    """Tried in this order on every node; the first that exists carries rendezvous, control and HTTP. Empty:
    the interface of the route to the first node."""
    environment: dict[VariableName, str] = {}
    """NCCL's own variables."""


class Preflight(Frozen):
    all_reduce_gigabytes_per_second: PositiveFloat | None = None
    """Floor on the bus bandwidth of an all-reduce over all ranks; None: not measured."""
    free_disk_gigabytes: NonNegativeInt = 10
    """On the shared folder, and on scratch where there is one."""
    driver: str | None = "580"
    """Oldest NVIDIA driver accepted; None: any. 580 is the first that runs the image's CUDA 13 by itself.
    From 535 on some do with forward-compatibility libraries (cuda-compat) in the image: then name it."""
    clock_skew_seconds: PositiveFloat = 5.0
    deadline_seconds: PositiveFloat = 120.0
    """For all nodes to have reported."""


class Storage(Frozen):
    gigabytes_per_second_per_node: PositiveFloat = 1.0
    """Written to the shared folder; for the plan's estimate of a checkpoint's time."""


class Cluster(Frozen):
    name: str
    """Of the profile's file."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: PositiveInt
    """Actor ranks a node; with gpu = "cpu" no GPU is asked for."""
    gpu: Literal["h100", "h200", "cpu"]
    gres: str | None = None
    """How GPUs are asked for, e.g. `gpu:h100`; None: --gpus-per-node."""
    host_memory_gigabytes: PositiveInt
    cpus_per_node: PositiveInt
    time: str = Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Walltime of one job, [days-]hours:minutes:seconds."""
    signal_seconds: PositiveInt = 600
    """So long before the end the run is told to save; Slurm may be a minute late."""
    exclusive: bool = True
    """False: other jobs share the nodes. The run still asks for all of their memory (--mem=0) unless
    extra_sbatch says `--mem=…`."""
    python: str = "python3"
    """On the nodes, inside the container where there is one; a relative path starts at the repository."""
    host_python: str = "python3"
    """On the nodes, outside the container: 3.9 or newer, without packages. It decides whether Slurm starts
    the job again; a relative path starts at `shared`."""
    shared: str
    """Folder that all nodes see under one path; runs/, models/ and data/ are looked for there."""
    scratch: str | None = None
    """Folder on a disk of each node, kept after a job: compiled kernels (node/caches.py). None: they are
    in `shared`/runs, a folder for each node."""
    setup: list[str] = []
    """Shell commands before the ranks start on a node, e.g. `module load cuda`."""
    max_attempts: PositiveInt = 20
    """Starts of one job, by Slurm and by the batch script; then it stops."""
    max_crashes: PositiveInt = 3
    """In a row without a new checkpoint; then the run stops with the reason."""
    extra_sbatch: list[Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=.*)?$")]] = []
    """Further options of sbatch by their long names, e.g. `--reservation=pmd`; they win over what a profile
    and a run ask for otherwise."""
    container: Container = Container()
    network: Network = Network()
    environment: dict[VariableName, str] = {}
    preflight: Preflight = Preflight()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.signal_seconds < 120:
            raise ConfigError(
                f"signal_seconds={self.signal_seconds}: Slurm's clock is coarse and a checkpoint takes time; "
                "give at least 120"
            )
        if self.signal_seconds >= self.time_seconds:
            raise ConfigError(f"signal_seconds={self.signal_seconds} is not within time={self.time}")
        return self

    @property
    def time_seconds(self) -> int:
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def extra_options(self) -> dict[str, str | None]:
        """extra_sbatch by long name; None for one without a value."""
        parted = (option.removeprefix("--").partition("=") for option in self.extra_sbatch)
        return {name: value or None for name, _, value in parted}

    @property
    def has_gpus(self) -> bool:
        return self.gpu != "cpu"

    @property
    def machines(self) -> Machines:
        """For the planner."""
        return Machines(
            device=DEVICES[self.gpu],
            devices_per_node=self.gpus_per_node,
            host_memory_bytes=self.host_memory_gigabytes * 10**9,
            storage_bytes_per_second=self.storage.gigabytes_per_second_per_node * 1e9,
        )


def load_cluster(profile: str) -> Cluster:
    """A profile by its name in slurm/clusters, or by its path. Raises ConfigError, one line a problem."""
    path = Path(profile) if profile.endswith(".toml") else PROFILES / f"{profile}.toml"
    if not path.is_file():
        there = sorted(file.stem for file in PROFILES.glob("*.toml"))
        raise ConfigError(
            f"{profile}: no such cluster profile{did_you_mean(profile, there)}; there are: "
            f"{', '.join(there)}, or give a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        return Cluster.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, Cluster))) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
