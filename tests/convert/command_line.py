"""`megatron-pmd convert …`, and what a model folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

LEFT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}
"""Of another program, in the shell in which a command is given: the ranks that they speak of are gone."""


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_pmd.cli.main", "convert", *map(str, words)],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | LEFT | {"COLUMNS": "200"},
    )  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
