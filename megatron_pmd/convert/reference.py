"""transformers' logits of a folder, in a process of their own: `python -m megatron_pmd.convert.reference`.

The stand-ins for CUDA that megatron-core needs leave transformers' rotary frequencies uninitialised, and the
memory of the one model is given back before the other is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_pmd.errors import ModelError
from megatron_pmd.waiting import waiting_for

DEADLINE_SECONDS = 3600


def logits(folder: Path, tokens: list[int], rounded_to: torch.dtype | None = None) -> torch.Tensor:
    """fp32 [tokens, vocabulary] of a folder's model; raises ModelError when it cannot be run.

    rounded_to: round the weights to this dtype first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.safetensors"
        dtype = str(rounded_to or torch.float32).removeprefix("torch.")
        command = [sys.executable, "-m", __name__, str(folder), json.dumps(tokens), str(path), dtype]
        with waiting_for(f"transformers' logits of {folder}", DEADLINE_SECONDS):
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ModelError(f"{folder}: transformers cannot run it: {reason}")
        return load_file(path)["logits"]


def main(folder: str, tokens: str, path: str, rounded_to: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, rounded_to)))
        found = model(torch.tensor([json.loads(tokens)])).logits[0]
    save_file({"logits": found.float().contiguous()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
