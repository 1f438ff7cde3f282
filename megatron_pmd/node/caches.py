"""Where compiled kernels are kept, so that the next job on this node need not compile them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pmd.errors import LaunchError

FOLDERS = {
    # its autotuning, torch.compile of CUDA graphs, ahead-of-time CuTe kernels; sglang/srt/environ.py
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_JIT_CACHE_DIR": "sglang_jit",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",  # SGLang sets DeepGEMM's own DG_JIT_CACHE_DIR to it
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # FlashInfer appends .cache/flashinfer
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TILELANG_CACHE_DIR": "tilelang",
    "TVM_FFI_CACHE_DIR": "tvm_ffi",
    "CUTE_DSL_CACHE_DIR": "cute_dsl",
    "EP_JIT_CACHE_DIR": "deep_ep",
    "CUDA_CACHE_PATH": "cuda",  # what the driver compiles from PTX
}
"""Environment variable -> folder. Actors and engines read them."""


def keep_compiled_kernels(host: str, packages: Mapping[str, Any]) -> Path:
    """Point the caches of all that compiles kernels at one folder, and make it; returns the folder.

    It is on the node's own disk (PMD_SCRATCH): many nodes that write one folder of a shared file system wait
    for each other. Without such a disk each node has a folder beside the runs (PMD_RUNS). A variable that
    is set already stays. packages: versions by name; other versions have another folder. Raises LaunchError
    when the folder cannot be made, or is another user's: what lies in it is run.
    """
    user = os.environ.get("SLURM_JOB_USER") or str(os.getuid())  # in some containers everyone is root
    if scratch := os.environ.get("PMD_SCRATCH"):
        own = folder = Path(scratch) / f"megatron-pmd-{user}"
    else:
        own = Path(os.environ["PMD_RUNS"]) / f".megatron-pmd-{user}"
        folder = own / host
    folder /= _version(packages)
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        if own.stat().st_uid != os.getuid():
            raise LaunchError(f"{own}, for compiled kernels, belongs to another user: remove it")
        for variable, name in FOLDERS.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(variable, str(folder / name))
    except OSError as error:
        raise LaunchError(f"{folder}: cannot keep compiled kernels there: {error.strerror}") from None
    return folder


def _version(packages: Mapping[str, Any]) -> str:
    """Readable, and another one whenever a package that compiles or is compiled against changes."""
    relevant = {name: version for name, version in packages.items() if name != "megatron-pmd"}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]
    return f"sglang-{packages.get('sglang')}-torch-{packages.get('torch')}-{digest}"
