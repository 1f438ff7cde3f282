"""What a rank and an engine import, in their own order, each in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.doctor import normalised, pins, same_version
from recipes import recipe
from tests.gpu_contract.conftest import LEFT_OUT
from tests.gpu_contract.model_folders import ARCHITECTURES, ON_GPUS

PROJECT = Path(__file__).parents[2]
DEADLINE_SECONDS = 300
NOT_OF_THE_STACK = {"megatron-pmd", "pip"}


def run(module: str, result: Path, *words: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a program of this folder leaves in `result`; fails with its last words."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.gpu_contract.{module}", str(result), *words]
    started = {**(environment or os.environ), "PYTHONPATH": _path(environment)}
    done = subprocess.run(
        command, cwd=PROJECT, env=started, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def _path(environment: dict[str, str] | None) -> str:
    return os.pathsep.join([str(PROJECT), *filter(None, [(environment or os.environ).get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def rank(tmp_path_factory) -> dict[str, Any]:
    return run("rank_process", tmp_path_factory.mktemp("rank") / "found.json")


def test_what_is_installed_is_what_is_pinned_and_nothing_is_beside_it():
    pinned = pins("stack")
    wrong = []
    # not all of sys.path: setuptools puts copies of its own there
    for distribution in metadata.distributions(path=[sysconfig.get_path("purelib")]):
        name = normalised(distribution.metadata["Name"])
        if name in NOT_OF_THE_STACK:
            continue
        if name not in pinned:
            wrong.append(f"{name} {distribution.version} has no pin in constraints/stack.txt")
        elif not same_version(distribution.version, pinned[name]):
            wrong.append(f"{name} {distribution.version} is not {pinned[name]}")
    assert wrong == []


def test_nothing_of_transformer_engine_is_imported_before_its_environment_is_set(rank):
    assert rank["before the environment was set"] == []


def test_megatron_core_finds_every_name_of_transformer_engine_that_it_would_silently_do_without(rank):
    assert rank["missing"] == []
    assert rank["adam"].startswith("transformer_engine."), rank["adam"]


@pytest.mark.xfail(
    strict=True,
    reason="megatron-core 0.19.2 wants EventOverlap of deep_ep.utils, where sgl-deep-ep 0.1.2 has none",
)
def test_an_actor_can_send_tokens_to_experts_through_deepep(rank):
    """actor.experts.dispatcher=deepep, which no recipe sets; engines use DeepEP by themselves."""
    assert rank["deepep"]


def test_what_the_environment_leaves_out_is_left_out_and_a_rank_knows_it(rank):
    there = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    assert LEFT_OUT.keys() == {"apex"} and rank["fused accumulation"] is there


@pytest.mark.parametrize(
    "module", ["sgl_kernel", "flashinfer", "deep_gemm", "torch_memory_saver", "tilelang", "triton"]
)
def test_the_kernels_of_sglang_import(module):
    importlib.import_module(module)


@pytest.mark.parametrize("name", [name for name in ON_GPUS if recipe(name).asks_for_deepep()])
def test_deepep_imports_where_a_recipe_asks_for_it(name):
    assert importlib.import_module("deep_ep").Buffer is not None, name


@pytest.mark.parametrize("architecture", ARCHITECTURES.values())
def test_sglang_has_the_recipes_models(architecture):
    """It drops a model whose file does not import, with a warning in a log that nobody reads."""
    from sglang.srt.models.registry import ModelRegistry

    model, found = ModelRegistry.resolve_model_cls([architecture])
    assert found == architecture and re.fullmatch(architecture, model.__name__)
