"""What convert/reference.py computes, in processes forked from one that has imported transformers.

Those that it starts spend 7 s of a core on that; tests/convert/test_proofs.py has three of them.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_pmd.convert import reference

DEADLINE_SECONDS = 300
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [reference.__name__, "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]
)


def logits(folder: Path, tokens: list[int], rounded_to: torch.dtype | None = None) -> torch.Tensor:
    """In place of reference.logits, with its arguments."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.safetensors"
        dtype = str(rounded_to or torch.float32).removeprefix("torch.")
        words = (str(folder), json.dumps(tokens), str(path), dtype)
        process = FORK_SERVER.Process(target=reference.main, args=words)
        process.start()
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == 0, f"{folder}: transformers' process ended with {process.exitcode}"
        return load_file(path)["logits"]
