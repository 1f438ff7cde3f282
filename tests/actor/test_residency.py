"""What leaves the device and comes back; here both places are the host's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.actor.residency import OptimizerStates, drop_quantized_copies
from tests.actor.launch import launch

KINDS = {"fp32": 2, "bf16": 3}
"""Tensors a parameter: two moments, and fp32 parameters where those of the model are not: views of the
model's leave with it."""


@pytest.fixture(scope="module")
def outcome(models) -> dict[str, Any]:
    return launch("off_and_on", cases={name: (models / "qwen3", name) for name in KINDS})[0]


@pytest.mark.parametrize("precision", KINDS)
def test_steps_with_the_optimizer_away_between_them_are_those_without_bit_for_bit(outcome, precision):
    assert outcome[precision]["steps"] == outcome[precision]["alone"]
    assert outcome[precision]["equal"]


@pytest.mark.parametrize("precision", KINDS)
def test_each_tensor_has_one_copy_on_the_host_which_is_used_again(outcome, precision):
    first, *later = outcome[precision]["addresses"]
    assert len(first) == len(set(first)) > 0
    assert all(addresses == first for addresses in later)
    assert outcome[precision]["kinds"] == KINDS[precision]


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


def test_of_an_optimizer_made_of_others_the_states_of_those_leave():
    """A share on the host (HybridDeviceOptimizer): its parts hold fp32 parameters, it those of the model."""
    model, main = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    part = SimpleNamespace(
        param_groups=[{"params": [main]}], state={main: {"exp_avg": torch.zeros(3), "master_param": main}}
    )
    whole = SimpleNamespace(param_groups=[{"params": [model]}], state={}, sub_optimizers=[part])
    chunk = SimpleNamespace(buffers=[], expert_parallel_buffers=[])
    states = OptimizerStates([chunk], SimpleNamespace(optimizer=whole))
    found = [(name, tensor.data_ptr()) for (_, name), tensor, _ in states._tensors()]
    assert found == [("", main.data_ptr()), ("exp_avg", part.state[main]["exp_avg"].data_ptr())]
