"""What a run ran with: packages, the commit, the machine. Imports none of the packages."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_pmd

PACKAGES = (
    "torch", "megatron-core", "megatron-bridge", "transformer-engine", "sglang", "sglang-kernel",
    "sglang-router", "transformers", "megatron-pmd",
)  # fmt: skip
"""What computes, or what another version of computes otherwise; None where one is not installed."""


def versions() -> dict[str, Any]:
    """Contents of versions.json."""
    return {
        **software(),
        "hostname": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "gpus": (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
    }


def software() -> dict[str, Any]:
    """Of these, what is the same on all nodes of a run."""
    packages = {name: _package(name) for name in PACKAGES}
    commit = _commit(Path(megatron_pmd.__file__))
    return {"python": platform.python_version(), "packages": packages, "commit": commit}


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # run from a checkout that was not installed
        return megatron_pmd.__version__ if name == "megatron-pmd" else None


def _commit(file: Path) -> str | None:
    """The checkout's commit, marked when files differ from it; None for an installed package."""
    git = ("git", "-C", str(file.parent))
    # a virtual environment may lie inside somebody else's checkout: only a tracked file speaks for its commit
    if _output(*git, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit} with uncommitted changes" if commit and changed else commit


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
