"""Parameters in FP8 that an optimizer's fp32 ones are written to, and scales that ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
from transformer_engine.pytorch import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.utils import post_all_gather_processing, quantize_master_weights

from tests.emulated_cuda.tests import formats

RECIPES: dict[str, Any] = {
    "delayed": DelayedScaling,
    "tensorwise": Float8CurrentScaling,
    "blockwise": Float8BlockScaling,
}
OUTER, INNER = 384, 256


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """One rank, over the device's NCCL."""
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).cuda()


def kept(values: formats.Matrix, name: str, scale: float) -> formats.Matrix:
    """The values as the recipe keeps a parameter."""
    if name == "blockwise":
        return formats.rounded(values, "E4M3", (128, 128), formats.power_of_two_scale)
    scale_of = formats.tensor_scale if name == "tensorwise" else lambda *_: scale
    return formats.rounded(values, "E4M3", values.shape, scale_of)


@pytest.mark.parametrize("name", RECIPES)
def test_the_optimizers_fp32_parameters_are_rounded_into_the_fp8_ones(name: str, group: Any) -> None:
    with te.quantized_model_init(enabled=True, recipe=RECIPES[name]()):
        layer = te.Linear(INNER, OUTER, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weight: Any = layer.weight
    master = random(OUTER, INNER)
    scale = weight._get_quantizer().scale.item() if name == "delayed" else 0.0
    quantize_master_weights([weight], [master.reshape(-1)], [0], group)
    # The library rounds fp32 parameters to the layer's type first.
    expected = kept(formats.matrix(master.bfloat16()), name, scale)
    assert formats.relative(weight.dequantize(dtype=torch.float32), expected) < 1e-6
    post_all_gather_processing([weight])
    x = random(32, INNER, seed=1).bfloat16().requires_grad_()
    with te.autocast(enabled=True, recipe=RECIPES[name]()):
        output = layer(x)
    output.sum().backward()
    plain = formats.matrix(torch.ones_like(output)) @ expected
    assert x.grad is not None
    assert formats.relative(x.grad, plain) < 4e-3, "the columns are those of the new values"


def test_ranks_that_share_a_tensor_share_its_largest_magnitude(group: Any) -> None:
    x = random(32, 64)
    alone = Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, device="cuda")
    shared = Float8CurrentScalingQuantizer(
        te.DType.kFloat8E4M3, device="cuda", with_amax_reduction=True, amax_reduction_group=group
    )
    assert torch.equal(shared(x)._data, alone(x)._data)
    assert torch.equal(shared(x)._scale_inv, alone(x)._scale_inv)
