"""Starts a program on the emulated device: `python -m tests.emulated_cuda.run [--devices N] -m MODULE ...`.

Every Python process that the program starts is on the device too.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import build

HERE = Path(__file__).parent
ADDRESS_SPACE_BYTES = 40 * 2**30
"""CUDA's libraries alone take 10 GiB of addresses. A run without a limit took all memory of the machine."""
PRELOADED = (*build.LIBRARIES, build.DRIVER)


def libraries() -> Path:
    """The folder of the emulated libraries, built if they are older than their sources."""
    folder = Path(os.environ.get("EMULATED_CUDA_BUILD", "build/emulated_cuda")).resolve()
    newest = max(file.stat().st_mtime for file in (*build.SOURCES.iterdir(), Path(build.__file__)))
    built = folder / PRELOADED[-1].name
    if not built.exists() or built.stat().st_mtime < newest:
        build.build(folder)
    return folder


def environment(folder: Path, state: Path, devices: int = 1) -> dict[str, str]:
    """What a process of the emulated device needs of its environment.

    `folder` has the libraries; `state` is where its processes share their accounts and messages.
    """
    package = __package__ or HERE.name
    root = HERE.parents[package.count(".")]
    path = [str(HERE / "site"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "LD_PRELOAD": ":".join(str(folder / library.name) for library in PRELOADED),
        "LD_LIBRARY_PATH": ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join(path),
        "EMULATED_CUDA_HOOKS": f"{package}.hooks",
        "EMULATED_CUDA_STATE": str(state),
        "EMULATED_CUDA_DEVICES": str(devices),
        # a compiled function would launch Triton's kernels; uncompiled it is the same function
        "TORCH_COMPILE_DISABLE": "1",
        "NVTE_DISABLE_NVRTC": "1",
        # DeepEP refuses two libraries of NCCL in a process: DeepEP's own pulls the real one in
        "EP_SUPPRESS_NCCL_CHECK": "1",
        "CUDA_HOME": str(build.packages_folder() / "cu13"),
    }


def device_of_this_worker() -> None:
    """Give a worker of pytest-xdist, and what it starts, devices that no other worker fills.

    To be called before the first call of CUDA.
    """
    worker, state = os.environ.get("PYTEST_XDIST_WORKER"), Path(os.environ["EMULATED_CUDA_STATE"])
    if worker and state.name != worker:
        (state / worker).mkdir(exist_ok=True)
        os.environ["EMULATED_CUDA_STATE"] = str(state / worker)


def run(words: list[str], devices: int = 1) -> int:
    """Run Python with these words on the device; returns its exit code."""
    state = Path(tempfile.mkdtemp(prefix="emulated-cuda-", dir="/dev/shm"))
    try:
        variables = environment(libraries(), state, devices)
        return subprocess.run([sys.executable, *words], env=variables, preexec_fn=_limit).returncode
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, hard))


if __name__ == "__main__":
    given, count = sys.argv[1:], 1
    if given[:1] == ["--devices"]:
        count, given = int(given[1]), given[2:]
    sys.exit(run(given, count))
