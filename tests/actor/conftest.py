"""The tiny models with their references, and the training runs that several tests read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.config import Layout
from tests.actor.family_models import MODELS, write_family
from tests.actor.launch import launch
from tests.actor.reference import Reference, write_with_references
from tests.actor.tiny_models import FAMILIES

LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "dense, tensor=2": ("qwen2", dict(tensor=2)),
    "dense, pipeline=2": ("qwen3", dict(pipeline=2)),
    "dense with biases, pipeline=2": ("qwen2", dict(pipeline=2)),
    "dense, data=2": ("llama", dict(data=2)),
    "dense, context=2": ("qwen2", dict(context=2)),
    "dense, pipeline=2, virtual_pipeline=2": ("qwen3", dict(pipeline=2, virtual_pipeline=2)),
    "moe, tensor=2": ("qwen3moe", dict(tensor=2)),
    "moe, tensor=2, expert=2": ("qwen3moe", dict(tensor=2, expert=2)),
    "moe, expert=2, data=2": ("qwen3moe", dict(expert=2, data=2)),
    "moe, context=2, expert=2": ("qwen3moe", dict(context=2, expert=2)),
    "latent, tensor=2, expert=2": ("deepseek", dict(tensor=2, expert=2)),
    "latent, pipeline=2": ("moonlight", dict(pipeline=2)),
    "latent, context=2, expert=2": ("deepseek", dict(context=2, expert=2)),
    "dense, tensor=2, pipeline=2": ("qwen3", dict(tensor=2, pipeline=2)),
    "dense, tensor=2, pipeline=2, virtual_pipeline=2": (
        "llama",
        dict(tensor=2, pipeline=2, virtual_pipeline=2),
    ),
    "dense, tensor=2, data=2": ("llama", dict(tensor=2, data=2)),
    "dense, tensor=2, context=2": ("qwen2", dict(tensor=2, context=2)),
    "dense, context=2, data=2": ("qwen3", dict(context=2, data=2)),
    "moe, tensor=2, expert=2, data=2": ("qwen3moe", dict(tensor=2, expert=2, data=2)),
    "moe, expert_tensor=2": ("qwen3moe", dict(tensor=2, expert=2, expert_tensor=2, data=2)),
    "moe, pipeline=2, expert=2, data=2": ("qwen3moe", dict(pipeline=2, expert=2, data=2)),
    "moe, pipeline=2, virtual_pipeline=2, expert=2": (
        "qwen3moe",
        dict(tensor=2, pipeline=2, virtual_pipeline=2, expert=2),
    ),
}


def ranks_of(name: str, layouts: dict[str, tuple[str, dict[str, int]]] = LAYOUTS) -> int:
    return Layout(**layouts[name][1]).ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, one a family, each with reference.pt; xdist's workers share one."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    return write_with_references(root, {family: (family, {}) for family in FAMILIES})


@pytest.fixture(scope="session")
def reference(models: Path) -> Callable[[str], Reference]:
    return lambda family: torch.load(models / family / "reference.pt", weights_only=False)


@pytest.fixture(scope="session")
def of_families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, one of each of family_models.MODELS, each with reference.pt."""
    root = tmp_path_factory.mktemp("of-families")
    for kind in MODELS:
        write_family(root / kind, kind)
    return root


@pytest.fixture(scope="session")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """programs.train's result for every family, all in one process."""
    folder = tmp_path_factory.mktemp("one-process")
    return launch("train", cases={f: (models / f, {}, folder / f) for f in FAMILIES})[0]


@pytest.fixture(scope="session")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Every rank's result of programs.train under one of LAYOUTS; one launch for all of as many ranks."""
    done: dict[int, list[dict[str, Any]]] = {}

    def run(name: str) -> list[dict[str, Any]]:
        ranks = ranks_of(name)
        if ranks not in done:
            checkpoints = tmp_path_factory.mktemp(f"layouts-of-{ranks}")
            cases = {
                other: (models / family, layout, checkpoints / str(i))
                for i, (other, (family, layout)) in enumerate(LAYOUTS.items())
                if ranks_of(other) == ranks
            }
            done[ranks] = launch("train", ranks=ranks, cases=cases)
        return [result[name] for result in done[ranks]]

    return run
