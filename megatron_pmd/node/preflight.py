"""Checks of every node of a job before its ranks start; a node that fails is named.

Each node writes a report into the shared run folder, which proves that it sees it and can write to it, waits
for those of the others, and judges all of them alike.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from megatron_pmd import network
from megatron_pmd.config import RunConfig, explain
from megatron_pmd.engine.placement import devices_of_node
from megatron_pmd.errors import ConfigError, LaunchError, ModelError
from megatron_pmd.files import iterations_in
from megatron_pmd.launch.cluster import Preflight
from megatron_pmd.network import Interface
from megatron_pmd.node.allocation import Allocation, host_name
from megatron_pmd.node.caches import keep_compiled_kernels
from megatron_pmd.observe.versions import software
from megatron_pmd.plugins import did_you_mean
from megatron_pmd.waiting import waiting_for

POLL_SECONDS = 0.2
QUERY_SECONDS = 60.0
GPU_QUERY = "index,driver_version,ecc.errors.uncorrected.volatile.total,memory.used,memory.total"


@dataclass
class Report:
    """What one node found out about itself."""

    host: str
    interface: str = ""
    address: str = ""
    clock_offset_seconds: float = 0.0
    """Of this node's clock from that of the shared file system."""
    software: dict[str, Any] = field(default_factory=dict)
    """Versions and commit; the same on all nodes."""
    problems: list[str] = field(default_factory=list)
    shared_problems: list[str] = field(default_factory=list)
    """Of the run's folder: every node has them, and none is to blame."""


def check_nodes(config: RunConfig, folder: Path, allocation: Allocation) -> list[Report]:
    """Examine this node, wait for the reports of all, and return them in the nodes' order.

    Sets GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and where compiled kernels are kept. Raises LaunchError naming
    each node with a problem; see refuse.
    """
    limits = _limits()
    report = Report(allocation.host)
    try:
        interface = _interface(config, allocation)
        report.interface, report.address = interface
        variables = network.variables(interface)
        # a profile's own are for jobs of several nodes: one node listens where nothing else reaches it
        os.environ.update(variables if _alone(config, allocation) else variables | os.environ)
    except LaunchError as error:
        report.problems.append(str(error))
    report.software = software()
    report.problems += disk_problems(limits, _scratch())
    of_memory, of_room = plan_problems(config, allocation, folder)
    report.problems += of_memory
    report.shared_problems = disk_problems(limits, [folder]) + of_room
    report.problems += core_problems()
    devices = devices_of_node(config, allocation.ranks_per_node)
    report.problems += device_problems(devices, limits, allocation.host, report.software["packages"])
    meeting = allocation.state / "preflight" / str(allocation.attempt)
    reports = exchange(report, meeting, allocation, limits.deadline_seconds)
    if shared := next((each.shared_problems for each in reports if each.shared_problems), []):
        raise LaunchError(f"pre-flight: {'; '.join(shared)}")
    refuse(judge(reports, limits.clock_skew_seconds), allocation)
    return reports


def _scratch() -> list[str]:
    """The folder on a disk of this node's own, where the profile has one."""
    return list(filter(None, [os.environ.get("PMD_SCRATCH")]))


def _limits() -> Preflight:
    """The profile's. Raises ConfigError for a PMD_PREFLIGHT that is not its settings."""
    try:
        return Preflight.model_validate_json(os.environ.get("PMD_PREFLIGHT") or "{}")
    except ValidationError as error:
        raise ConfigError(f"PMD_PREFLIGHT: {'; '.join(explain(error, Preflight))}") from None


def check_engine_node(config: RunConfig, run: Path, driver: dict[str, Any]) -> None:
    """Examine a node of layout.engine_nodes before its engines start. Raises LaunchError naming it.

    The others do not wait for it: the run goes on without. driver: software() of the driver.
    """
    host, own = host_name(), software()
    problems = [
        f"{key} is {value}, on the driver's node {_flat(driver).get(key)}"
        for key, value in _flat(own).items()
        if value != _flat(driver).get(key)
    ]
    shared: list[str] = []
    if "PMD_GPU" in os.environ:  # a job of Slurm's, with the limits of its profile
        limits = _limits()
        problems += disk_problems(limits, _scratch()) + core_problems()
        problems += device_problems(config.devices_per_engine_node, limits, host, own["packages"])
        shared = disk_problems(limits, [run])
    if problems:
        _leave_out(host)
    if problems or shared:
        raise LaunchError(f"engine node {host} cannot take part: {'; '.join([*problems, *shared])}")


def device_problems(devices: int, limits: Preflight, host: str, packages: dict[str, Any]) -> list[str]:
    """Of this node's GPUs, so many of which are wanted; none where PMD_GPU says that it has none."""
    if os.environ.get("PMD_GPU", "cpu") == "cpu":
        return []
    found = gpu_problems(_nvidia_smi(), devices, limits.driver)
    found += cuda_problems(devices, limits.deadline_seconds)
    try:
        keep_compiled_kernels(host, packages)
    except LaunchError as error:
        found.append(str(error))
    return found


def _alone(config: RunConfig, allocation: Allocation) -> bool:
    """Whether nothing of the run is on another node."""
    return allocation.nodes == 1 and not config.layout.engine_nodes


def _interface(config: RunConfig, allocation: Allocation) -> Interface:
    """That of the route to another node; the first node's name may stand for an address of loopback there."""
    if _alone(config, allocation):
        return network.loopback()
    names = os.environ.get("PMD_NODES", "").split()
    peer = names[1] if allocation.rank == 0 and len(names) > 1 else allocation.master
    return network.choose_interface(os.environ.get("PMD_INTERFACES", "").split(), peer)


def exchange(report: Report, meeting: Path, allocation: Allocation, deadline_seconds: float) -> list[Report]:
    """Write this node's report, and read those of all nodes, in their order.

    Raises LaunchError naming the nodes that have not reported by the deadline.
    """
    meeting.mkdir(parents=True, exist_ok=True)
    own, partial = meeting / f"{allocation.rank}.json", meeting / f"{allocation.rank}.partial"
    partial.write_text("")
    report.clock_offset_seconds = time.time() - partial.stat().st_mtime
    partial.write_text(json.dumps(asdict(report)))
    partial.rename(own)
    limit, names = time.monotonic() + deadline_seconds, os.environ.get("PMD_NODES", "").split()

    def missing() -> list[str]:
        absent = [rank for rank in range(allocation.nodes) if not (meeting / f"{rank}.json").exists()]
        return [names[rank] if rank < len(names) else f"number {rank}" for rank in absent]

    def words() -> str:
        return f"pre-flight reports in {meeting} of nodes {' '.join(missing())}"

    with waiting_for(words, deadline_seconds):
        while absent := missing():
            if time.monotonic() > limit:
                problem = f"no report in {meeting} after {deadline_seconds:g} s: is the folder mounted there?"
                refuse({name: [problem] for name in absent}, allocation)
            time.sleep(POLL_SECONDS)
    return [Report(**json.loads((meeting / f"{rank}.json").read_text())) for rank in range(allocation.nodes)]


def judge(reports: Sequence[Report], clock_skew_seconds: float) -> dict[str, list[str]]:
    """Problems by node: its own, and where it differs from what most nodes have."""
    problems = {report.host: list(report.problems) for report in reports}
    most = json.loads(Counter(json.dumps(r.software, sort_keys=True) for r in reports).most_common(1)[0][0])
    for report in reports:
        for key, value in _flat(report.software).items():
            if value != _flat(most).get(key):
                problems[report.host].append(f"{key} is {value}, elsewhere {_flat(most).get(key)}")
    offsets = sorted(report.clock_offset_seconds for report in reports)
    middle = offsets[len(offsets) // 2]
    for report in reports:
        skew = report.clock_offset_seconds - middle
        if abs(skew) > clock_skew_seconds:
            problems[report.host].append(f"its clock is {skew:+.1f} s off the others'")
    return {host: found for host, found in problems.items() if found}


def refuse(problems: dict[str, list[str]], allocation: Allocation) -> None:
    """Raise LaunchError when there are problems, after listing their nodes for the batch script to leave out.

    Where all of several nodes have one, none is listed: the profile or the cluster is to blame, and each
    attempt would use up as many good nodes.
    """
    if not problems:
        return
    if allocation.nodes == 1 or len(problems) < allocation.nodes:
        (allocation.state / "bad_nodes").write_text("".join(f"{host}\n" for host in problems))
    listed = "\n".join(f"  node {host}: {problem}" for host, found in problems.items() for problem in found)
    raise LaunchError(f"pre-flight: {len(problems)} node(s) cannot take part:\n{listed}")


def disk_problems(limits: Preflight, folders: Sequence[str | Path]) -> list[str]:
    found = []
    for folder in folders:
        try:
            free = shutil.disk_usage(folder).free / 1e9
        except OSError as error:
            found.append(f"{folder}: {error.strerror}")
            continue
        if free < limits.free_disk_gigabytes:
            found.append(f"{folder}: {free:.0f} GB free, {limits.free_disk_gigabytes} wanted")
    return found


def plan_problems(config: RunConfig, allocation: Allocation, folder: Path) -> tuple[list[str], list[str]]:
    """Against the plan: of this node's free host memory, and of the room for checkpoints in the run's folder.

    Raises ConfigError for a PMD_GPU that is no device.
    """
    from megatron_pmd.planner.hardware import DEVICES, Machines
    from megatron_pmd.planner.planning import make_plan

    free = psutil.virtual_memory().available
    gpu = os.environ.get("PMD_GPU", "cpu")
    if gpu not in DEVICES:
        raise ConfigError(f"PMD_GPU={gpu} is none of {', '.join(DEVICES)}{did_you_mean(gpu, DEVICES)}")
    device = DEVICES[gpu]
    try:
        devices = devices_of_node(config, allocation.ranks_per_node)
        plan = make_plan(config, Machines(device, devices, free, 1e9))
    except ModelError as error:
        print(f"{allocation.host}: memory and disk not compared with a plan: {error}", flush=True)
        return [], []
    of_memory, of_room = list[str](), list[str]()
    need = plan.host_bytes
    if need > free:
        of_memory.append(f"{free / 1e9:.1f} GB of host memory free, the plan needs {need / 1e9:.1f} GB")
    # one is written before the oldest goes
    there = len(iterations_in(folder / "checkpoints"))
    missing = max(1, config.checkpoint.keep + 1 - there) * plan.checkpoint_bytes
    room = shutil.disk_usage(folder).free
    if missing > room:
        of_room.append(
            f"{folder}: {room / 1e9:.1f} GB free, checkpoints of {plan.checkpoint_bytes / 1e9:.1f} GB, "
            f"of which {config.checkpoint.keep} are kept and {there} there, need {missing / 1e9:.1f} GB"
        )
    return of_memory, of_room


def gpu_problems(answer: str, wanted: int, driver: str | None) -> list[str]:
    """What nvidia-smi's answer to GPU_QUERY says against this node."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    found = [f"{len(rows)} GPUs answer, {wanted} wanted"] if len(rows) < wanted else []
    for index, version, errors, used, total in rows:
        if driver and _numbers(version) < _numbers(driver):
            found.append(f"GPU {index}: driver {version}, {driver} or newer wanted")
        if errors.isdigit() and int(errors):
            found.append(f"GPU {index}: {errors} uncorrected memory errors since its last reset")
        if int(used) > 0.05 * int(total):
            found.append(f"GPU {index}: {used} of {total} MiB in use before the run starts")
    return found


def core_problems() -> list[str]:
    """Whether this process, and so all ranks and engines, may use the cores that the job has of the node."""
    usable = len(os.sched_getaffinity(0))
    # of each node, e.g. 96(x4),64
    job = [int(n) for n in re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))]
    given = min([*job, os.cpu_count() or usable])
    # a node may keep some cores to itself, or count threads
    if 2 * usable >= given:
        return []
    return [f"{usable} of the job's {given} cores may be used: srun has bound its step; use --cpu-bind=none"]


def cuda_problems(devices: int, deadline_seconds: float) -> list[str]:
    """Whether torch computes on so many GPUs: nvidia-smi lists GPUs also where CUDA cannot start.

    In a process of its own, which leaves nothing on them.
    """
    program = f"import torch\nfor i in range({devices}): torch.ones(1, device=f'cuda:{{i}}').sum().item()"
    command = [sys.executable, "-W", "ignore", "-c", program]
    try:
        with waiting_for(f"torch to compute on {devices} GPUs", deadline_seconds):
            done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_seconds)
    except subprocess.TimeoutExpired:
        return [f"CUDA did not start on {devices} GPUs within {deadline_seconds:g} s"]
    if done.returncode == 0:
        return []
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    error = next((line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)), said[-1])
    return [f"CUDA does not start: {error}"]


def refuse_gpu_node() -> None:
    """For a rank without CUDA: raises LaunchError where there are to be GPUs, and has the node left out.

    The rank would else train on the processor, over gloo, and those of other nodes wait for it over NCCL.
    """
    if os.environ.get("PMD_GPU", "cpu") == "cpu":
        return
    host = host_name()
    _leave_out(host)
    import torch

    why = "torch.cuda.is_available() says no more"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error)
    raise LaunchError(f"node {host}: CUDA does not start, although PMD_GPU={os.environ['PMD_GPU']}: {why}")


def _leave_out(host: str) -> None:
    """Have the job's next attempt run without this node."""
    if state := os.environ.get("PMD_STATE"):
        with (Path(state) / "bad_nodes").open("a") as file:
            file.write(f"{host}\n")


def _nvidia_smi() -> str:
    query = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        with waiting_for("nvidia-smi", QUERY_SECONDS):
            done = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
        return done.stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _flat(software: dict[str, Any]) -> dict[str, Any]:
    packages = software.get("packages") or {}
    return {**{key: value for key, value in software.items() if key != "packages"}, **packages}
