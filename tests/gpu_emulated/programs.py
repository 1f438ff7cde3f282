"""What the tests run on ranks with an emulated device each: see tests/gpu_emulated/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_pmd.config import RunConfig
from tests.actor.actor_programs import train_one


def to_host(value: Any) -> Any:
    """The same with every tensor on the CPU, for a reader that has no device."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: to_host(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(each) for each in value)
    if hasattr(value, "__dict__"):
        vars(value).update({name: to_host(each) for name, each in vars(value).items()})
    return value


def train(cases: dict[str, tuple[RunConfig, Path]]) -> dict[str, Any]:
    """actor_programs.train_one's results, by case."""
    return {name: to_host(train_one(config, folder)) for name, (config, folder) in cases.items()}
