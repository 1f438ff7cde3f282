"""The contract with the CUDA packages: `python -m tools.gpu_contract`, as `make gpu-contract` runs it.

The packages want a driver's library to be imported at all. Where there is none, they get one that answers to
every call that there is no device.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.emulated_cuda.build import calls_of_driver, packages_folder

PROJECT = Path(__file__).resolve().parents[1]
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE of cuda.h."""
NOT_FOUND = 500
ANSWERS = {
    "cuDriverGetVersion": "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }",
    "cuDeviceGetCount": f"int cuDeviceGetCount(int *count) {{ *count = 0; return {NO_DEVICE}; }}",
    "cuGetErrorName": 'int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }',
    "cuGetErrorString": 'int cuGetErrorString(int e, const char **s) { *s = "no device"; return 0; }',
    **{
        name: f"int {name}(const char *n, void **p) {{ if (p) *p = 0; return {NOT_FOUND}; }}"
        for name in ("cuGetProcAddress", "cuGetProcAddress_v2")
    },
}
"""Calls that ask for more than a device; all others answer NO_DEVICE."""


def write_driver(folder: Path) -> None:
    """A libcuda.so.1 with every call that cuda.h declares, in the folder; it finds no device."""
    names = calls_of_driver(packages_folder() / "cu13/include").keys()
    source = folder / "cuda.c"
    rest = [f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in sorted(names - ANSWERS.keys())]
    source.write_text("\n".join([*ANSWERS.values(), *rest]) + "\n")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", source, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"],
        check=True,
    )


def has_driver() -> bool:
    """Whether this machine has NVIDIA's own."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def environment(folder: Path) -> dict[str, str]:
    """With the driver's library, and those of the pip packages: what looks for them by name finds them."""
    libraries = sorted(packages_folder().glob("*/lib"))
    if not has_driver():
        write_driver(folder)
        libraries = [folder, *libraries]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    path = os.pathsep.join([*map(str, libraries), *([inherited] if inherited else [])])
    cuda = os.environ.get("CUDA_HOME", str(packages_folder() / "cu13"))
    return os.environ | {"LD_LIBRARY_PATH": path, "CUDA_HOME": cuda, "OMP_NUM_THREADS": "1"}


def main(options: list[str]) -> int:
    """pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "tests/gpu_contract", "-n", "2", "--durations=10"]
        command += options
        return subprocess.run(command, cwd=PROJECT, env=environment(Path(folder))).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
