"""Whether an engine's kernels are compiled: its first start on a node compiles them, for many minutes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

OF_ONE_ENGINE = {
    "host", "port", "api_key", "admin_api_key", "random_seed", "base_gpu_id", "node_rank", "dist_init_addr",
    "load_format", "weight_version", "log_level",
}  # fmt: skip
"""Options that no kernel depends on."""


def ready_before(options: Mapping[str, Any]) -> Path:
    """The file that exists if an engine with these options has been ready with the kernels cached here.

    It lies in SGLang's cache (SGLANG_CACHE_DIR, which node/caches.py sets), and goes with it.
    """
    cache = Path(os.environ.get("SGLANG_CACHE_DIR") or "~/.cache/sglang").expanduser()
    kernels = {name: value for name, value in options.items() if name not in OF_ONE_ENGINE}
    kernels["version"] = metadata.version("sglang")
    digest = hashlib.sha256(json.dumps(kernels, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache / "megatron-pmd-ready" / digest
