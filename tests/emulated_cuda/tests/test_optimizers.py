"""Kernels over lists against torch.optim and plain sums, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_engine.pytorch  # noqa: F401  (it loads the next)
import transformer_engine_torch as tex
from transformer_engine.pytorch.optimizers import FusedAdam

from tests.emulated_cuda.tests.formats import relative

SHAPES = ((7, 5), (11,), (3, 2, 4))
STEPS = 4
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(
    decoupled: bool, start: list[torch.Tensor], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Parameters after torch's own steps in float64, with gradients of dtype."""
    parameters = [tensor.double().requires_grad_() for tensor in start]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(parameters, **SETTINGS)
    for step in range(STEPS):
        for i, parameter in enumerate(parameters):
            parameter.grad = random(parameter.shape, 100 * step + i).to(dtype).double()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def stepped(start: list[torch.Tensor], dtype: torch.dtype, **options: Any) -> tuple[list[torch.Tensor], Any]:
    parameters = [torch.nn.Parameter(tensor.to(dtype).cuda()) for tensor in start]
    optimizer = FusedAdam(parameters, **SETTINGS, **options)
    for step in range(STEPS):
        for i, parameter in enumerate(parameters):
            parameter.grad = random(parameter.shape, 100 * step + i).to(dtype).cuda()
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_in_fp32_is_torchs_in_float64(decoupled: bool) -> None:
    start = [random(shape, i) for i, shape in enumerate(SHAPES)]
    found, _ = stepped(start, torch.float32, adam_w_mode=decoupled)
    for a, b in zip(found, expected(decoupled, start), strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("remainders", [False, True])
def test_bf16_parameters_follow_fp32_ones_kept_whole_or_as_their_lower_half(remainders: bool) -> None:
    start = [random(shape, i).bfloat16() for i, shape in enumerate(SHAPES)]
    options = {"master_weights": True, "store_param_remainders": remainders}
    found, optimizer = stepped(start, torch.bfloat16, **options)
    for parameter, a, b in zip(
        optimizer.param_groups[0]["params"], found, expected(True, start, torch.bfloat16), strict=True
    ):
        kept = optimizer.state[parameter]["master_param"]
        if remainders:
            assert kept.dtype == torch.int16
            upper = a.cpu().view(torch.int16).int() - (kept.cpu() < 0).int()
            master = ((upper << 16) | (kept.cpu().int() & 0xFFFF)).view(torch.float32)
        else:
            master = kept
        assert relative(master, b) < 1e-6
        assert torch.equal(a.cpu(), master.cpu().bfloat16())


def test_moments_in_bf16_are_rounded_after_the_parameter_has_moved_by_them() -> None:
    start = [random(shape, i).bfloat16() for i, shape in enumerate(SHAPES)]
    options = {
        "master_weights": True, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16,
    }  # fmt: skip
    _, optimizer = stepped(start, torch.bfloat16, **options)
    beta1, beta2 = SETTINGS["betas"]
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        master = start[i].double()
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        for step in range(STEPS):
            g = random(parameter.shape, 100 * step + i).bfloat16().double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            moved = (m / (1 - beta1 ** (step + 1))) / (
                (v / (1 - beta2 ** (step + 1))).sqrt() + SETTINGS["eps"]
            )
            master = master - SETTINGS["lr"] * (moved + SETTINGS["weight_decay"] * master)
            m, v = m.bfloat16().double(), v.bfloat16().double()
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
        assert relative(optimizer.state[parameter]["master_param"], master) < 1e-6


def test_the_kernels_numbers_are_fp32() -> None:
    gradient, others = random((5,), 0).cuda(), [torch.zeros(5, device="cuda") for _ in range(3)]
    tex.multi_tensor_adam(
        2048, flag(), [[gradient], *([x] for x in others)], 1e-2, 0.9, 0.999, 1e-8, 1, 1, 1, 0.0
    )
    rest = (torch.tensor(1.0) - torch.tensor(0.999)).item()
    assert rest == pytest.approx(0.00099998713, rel=1e-8), "and not 0.001"
    assert relative(others[2], gradient.cpu().double().square() * rest) < 1e-6


def flag() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int, device="cuda")


def test_norms_are_those_of_float64_and_a_value_that_is_not_finite_raises_the_flag() -> None:
    tensors = [random(shape, i).bfloat16().cuda() for i, shape in enumerate(SHAPES)]
    raised = flag()
    whole, each = tex.multi_tensor_l2norm(2048, raised, [tensors], True)
    norms = torch.stack([tensor.cpu().double().norm() for tensor in tensors])
    assert relative(whole, norms.norm().reshape(1)) < 1e-6 and relative(each, norms) < 1e-6
    _, none = tex.multi_tensor_l2norm(2048, raised, [tensors], False)
    assert none.numel() == 0 and raised.item() == 0
    tensors[1][0] = torch.inf
    tex.multi_tensor_l2norm(2048, raised, [tensors], False)
    assert raised.item() == 1


def test_scaling_changes_type_and_size_and_a_value_that_is_not_finite_raises_the_flag() -> None:
    sources = [random(shape, i).bfloat16().cuda() for i, shape in enumerate(SHAPES)]
    targets = [torch.empty_like(source, dtype=torch.float32) for source in sources]
    raised = flag()
    tex.multi_tensor_scale(2048, raised, [sources, targets], 0.3)
    for source, target in zip(sources, targets, strict=True):
        assert relative(target, source.cpu().double() * 0.3) < 1e-6
    tex.multi_tensor_scale_tensor(2048, raised, [targets, targets], torch.tensor([2.0], device="cuda"))
    assert relative(targets[0], sources[0].cpu().double() * 0.6) < 1e-6 and raised.item() == 0
    sources[0][0] = torch.nan
    tex.multi_tensor_scale(2048, raised, [sources, targets], 1.0)
    assert raised.item() == 1 and targets[0].isnan().any()
