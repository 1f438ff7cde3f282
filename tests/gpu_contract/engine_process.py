"""Runs as a process of an engine, with the environment that an engine gets, and prints what it has as JSON.

Not a rank of the actor, and not the test: what SGLang and its libraries read from the environment, they read
while they are imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.gpu_contract.pretended_device import pretend

pretend()


def caches() -> dict[str, Any]:
    """Where each library that compiles kernels keeps them, as it has decided itself."""
    import tilelang
    import triton
    from flashinfer.jit import env as flashinfer
    from sglang.kernels.jit.utils.compile import cache as sglang_jit
    from sglang.srt.environ import envs
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor

    return {
        "SGLANG_CACHE_DIR": envs.SGLANG_CACHE_DIR.get(),
        "SGLANG_JIT_CACHE_DIR": str(envs.SGLANG_JIT_CACHE_DIR.get()),
        "SGLANG_DG_CACHE_DIR": os.environ["DG_JIT_CACHE_DIR"],
        "FLASHINFER_WORKSPACE_BASE": str(flashinfer.FLASHINFER_BASE_DIR),
        "TRITON_CACHE_DIR": triton.knobs.cache.dir,
        "TORCHINDUCTOR_CACHE_DIR": inductor(),
        "TILELANG_CACHE_DIR": tilelang.env.TILELANG_CACHE_DIR,
        "modules": [module.__name__ for module in (compile_utils, sglang_jit)],
    }


def plugin() -> dict[str, Any]:
    """What our plugin does to a request and to recorded experts, loaded as SGLang loads plugins."""
    import torch
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.plugins import load_plugins
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

    load_plugins()
    request = GenerateReqInput(input_ids=[1, 2], sampling_params={})
    request.normalize_batch_and_arguments()
    capturer: Any = RoutedExpertsCapturer.__new__(RoutedExpertsCapturer)
    kind = type(capturer)
    hooked = getattr(kind.get_topk, "__wrapped__", None)
    return {"asked": request.return_routed_experts, "hooked": hooked is not None, "torch": torch.__version__}


def environment() -> dict[str, Any]:
    """What SGLang has made of the variables that an engine is started with."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.environ import envs
    from sglang.srt.utils.network import get_local_ip_auto

    return {
        "SGLANG_TIMEOUT_KEEP_ALIVE": envs.SGLANG_TIMEOUT_KEEP_ALIVE.get(),
        "SGLANG_HEALTH_CHECK_TIMEOUT": http_server.HEALTH_CHECK_TIMEOUT,
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.get(),
        "SGLANG_WARMUP_TIMEOUT": envs.SGLANG_WARMUP_TIMEOUT.get(),
        "SGLANG_HOST_IP": get_local_ip_auto(),
        "loader": importlib.import_module("megatron_pmd.weight_sync.loader").__name__,
    }


if __name__ == "__main__":
    found = {"environment": environment(), "caches": caches(), "plugin": plugin()}
    Path(sys.argv[1]).write_text(json.dumps(found))
