"""What a rank and an engine import, in their own order, each in a process of its own."""

from __future__ import annotations

import importlib
import re
import sysconfig
from importlib import metadata
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from megatron_pmd.doctor import normalised, pins, same_version
from recipes import recipe
from tests.gpu_contract.conftest import LEFT_OUT
from tests.gpu_contract.model_folders import ARCHITECTURES, ON_GPUS
from tests.gpu_contract.programs import run

NOT_OF_THE_STACK = {"megatron-pmd", "pip"}


@pytest.fixture(scope="module")
def rank(tmp_path_factory) -> dict[str, Any]:
    found = tmp_path_factory.mktemp("rank") / "found.json"
    return run("rank_process", found, "actor.experts.dispatcher=deepep")


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


def test_an_actor_can_send_tokens_to_experts_through_deepep(rank):
    """actor.experts.dispatcher=deepep, which no recipe sets; engines use DeepEP by themselves."""
    assert rank["deepep"]


def test_deepep_still_lacks_the_name_that_megatron_core_looks_for(rank):
    """Where it has it, complete_deepep (megatron_pmd/actor/environment.py) is needed no more."""
    assert not rank["deepep has the name by itself"]


def test_deepep_takes_what_megatron_core_says_to_it(monkeypatch):
    """Arguments and results by name, forward and backward; what its kernels do, only devices say."""
    from deep_ep import Buffer
    from megatron.core.transformer.moe import fused_a2a

    for ranks in (8, 16):
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            assert config.get_nvl_buffer_size_hint(4096, ranks) > 0
    buffer = create_autospec(Buffer, instance=True)
    monkeypatch.setattr(fused_a2a, "get_buffer", lambda *_: buffer)
    tokens, experts = torch.ones(4, 8, requires_grad=True), torch.zeros(4, 2, dtype=torch.int64)
    buffer.get_dispatch_layout.return_value = (None, None, None, None, None)
    buffer.dispatch.return_value = (torch.ones(4, 8), experts.clone(), torch.ones(4, 2), [4], "handle", None)
    buffer.combine.return_value = (torch.ones(4, 8), torch.ones(4, 2), None)
    received, *_, handle = fused_a2a.FusedDispatch.apply(tokens, experts, torch.ones(4, 2), 8, None)
    combined, _ = fused_a2a.FusedCombine.apply(received, None, handle)
    combined.sum().backward()
    assert buffer.dispatch.call_count == buffer.combine.call_count == 2


def test_what_the_environment_leaves_out_is_left_out_and_a_rank_knows_it(rank):
    (module,) = LEFT_OUT
    assert rank["fused accumulation"] is (importlib.util.find_spec(module) is not None)


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
