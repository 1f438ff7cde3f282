"""What leaves the device and comes back; here both places are the host's memory."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.actor.residency import (
    OptimizerStates,
    drop_position_tables,
    drop_quantized_copies,
)
from tests.actor.launch import launch
from tests.actor.tiny_models import MUON, config_for

CASES: dict[str, dict[str, Any]] = {
    "fp32": dict(precision="fp32"),
    "bf16": dict(precision="bf16"),
    "muon, fp32": dict(precision="fp32", optimizer=MUON),
    "muon, bf16": dict(precision="bf16", optimizer=MUON),
}
MATRICES = 16 / 34
"""Of the model's parameters: four in each of four layers; beside four norms a layer, embedding, last norm."""
KINDS = {"fp32": 2, "bf16": 3, "muon, fp32": 2 - MATRICES, "muon, bf16": 3 - MATRICES}
"""Tensors a parameter: two moments, for a matrix of Muon's one momentum, and fp32 parameters where those of
the model are not: views of the model's leave with it."""


@pytest.fixture(scope="module")
def outcome(models) -> dict[str, Any]:
    return launch(
        "off_and_on", configs={name: config_for(models / "qwen3", **case) for name, case in CASES.items()}
    )[0]


@pytest.mark.parametrize("case", CASES)
def test_steps_with_the_optimizer_away_between_them_are_those_without_bit_for_bit(outcome, case):
    assert outcome[case]["steps"] == outcome[case]["alone"]
    assert outcome[case]["equal"]


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_has_one_copy_on_the_host_which_is_used_again(outcome, case):
    first, *later = outcome[case]["addresses"]
    assert len(first) == len(set(first)) > 0
    assert all(addresses == first for addresses in later)
    assert outcome[case]["kinds"] == pytest.approx(KINDS[case])


def test_fp8_copies_of_the_weights_are_let_go_and_those_that_can_be_made_again_alone():
    """The attributes are those of Transformer Engine's modules and parameters."""

    class Quantized(torch.nn.Parameter):
        def update_usage(self, *, rowwise_usage: bool, columnwise_usage: bool) -> None:
            self.usage = rowwise_usage, columnwise_usage

    class Blockwise(Quantized):
        def _create_columnwise(self) -> None: ...

    layer: Any = torch.nn.Linear(2, 2)
    layer._fp8_workspaces = {"weight": torch.zeros(4)}
    layer.blockwise, layer.mxfp8 = Blockwise(torch.zeros(2)), Quantized(torch.zeros(2))
    drop_quantized_copies([torch.nn.Sequential(layer)])
    assert layer._fp8_workspaces == {}
    assert layer.blockwise.usage == (True, False) and not hasattr(layer.mxfp8, "usage")


def test_the_tables_that_rotary_embeddings_keep_of_each_length_are_let_go():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert hasattr(RotaryEmbedding.forward, "cache_clear"), "megatron-core keeps none any more"

    forward: Any = lru_cache(maxsize=32)(lambda embedding, length: torch.arange(length))
    kind = type("Embedding", (torch.nn.Module,), {"forward": forward})
    embedding = kind()
    embedding(3)
    drop_position_tables([torch.nn.Sequential(embedding, torch.nn.Linear(2, 2))])
    assert forward.cache_info().currsize == 0


def test_of_an_optimizer_made_of_others_the_states_of_those_leave():
    """A share on the host (HybridDeviceOptimizer): its parts hold fp32 parameters, it those of the model."""
    model, main = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    part = SimpleNamespace(
        param_groups=[{"params": [main]}], state={main: {"exp_avg": torch.zeros(3), "master_param": main}}
    )
    whole = SimpleNamespace(param_groups=[{"params": [model]}], state={}, sub_optimizers=[part])
    chunk = SimpleNamespace(buffers=[], expert_parallel_buffers=[])
    chain = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=whole)])
    states = OptimizerStates([chunk], chain)
    found = [(name, tensor.data_ptr()) for (_, name), tensor, _ in states._tensors()]
    assert found == [("", main.data_ptr()), ("exp_avg", part.state[main]["exp_avg"].data_ptr())]
