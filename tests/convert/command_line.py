"""`megatron-pmd convert …`, and what a model folder holds."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.forked_command import ForkedCommand

LEFT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}
"""Of another program, in the shell in which a command is given: the ranks that they speak of are gone."""


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["convert", *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = ForkedCommand(command, Path.cwd(), output, LEFT | {"COLUMNS": "200"}, errors)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode is not None
        return subprocess.CompletedProcess(command, process.returncode, printed, errors.read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
