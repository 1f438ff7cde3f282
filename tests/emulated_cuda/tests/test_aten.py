"""ATen on the emulated device gives what it gives on the CPU, and says what it cannot do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "a product and its gradient": lambda x, y: torch.autograd.functional.jacobian(lambda z: z @ y.T, x),
    "several results": lambda x, y: torch.topk(x, 3),
    "in place": lambda x, y: x.clone().mul_(y).add_(1),
    "into a given tensor": lambda x, y: torch.add(x, y, out=torch.empty(0, device=x.device)),
    "into a view": lambda x, y: x.clone().T[1:3].zero_().sum() + x[2],
    "by index": lambda x, y: x[y > 0],
    "written by index": lambda x, y: x.clone().index_put_((torch.tensor([0, 1], device=x.device),), y[:2]),
    "a list at once": lambda x, y: torch._foreach_norm([x, y]),
    "a list in place": lambda x, y: _in_place([x.clone(), y.clone()]),
    "scattered": lambda x, y: x.clone().scatter_add_(0, (y > 0).long(), y),
    "sorted": lambda x, y: torch.sort(x, dim=0, stable=True),
    "another type": lambda x, y: x.to(torch.float8_e4m3fn).to(torch.bfloat16) * y.half(),
    "a number": lambda x, y: (x.max().item(), bool((x > y).any()), x.tolist()),
    "made there": lambda x, y: torch.arange(7, device=x.device) + torch.ones(7, device=x.device).cumsum(0),
    "with a number": lambda x, y: ((x * 8).long() % 3, (x * 8).int() & 6, x.half() * 0.3, y.max() * 2),
    "complex": lambda x, y: torch.fft.fft(x).conj().abs(),
    "empty": lambda x, y: (x[:0] @ y.T, x[:0].sum()),
    "strided": lambda x, y: x.T.contiguous().view(-1)[::3] + x.T.reshape(-1)[::3],
}  # fmt: skip


def _in_place(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_mul_(tensors, 3.0)
    torch._foreach_add_(tensors, tensors[::-1])
    return tensors


def to_cpu(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, (list, tuple)):
        return [to_cpu(each) for each in value]
    return value


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operator_gives_what_it_gives_on_the_cpu(name: str) -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    expected = OPERATIONS[name](x, y)
    found = OPERATIONS[name](x.cuda(), y.cuda())
    if isinstance(found, torch.Tensor):
        assert found.is_cuda
    torch.testing.assert_close(to_cpu(found), to_cpu(expected), rtol=0, atol=0)


def test_the_backward_pass_and_other_threads_have_the_kernels_too() -> None:
    x = torch.randn(8, 3, device="cuda", requires_grad=True)
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(x.softmax(-1).square().sum()))
    thread.start()
    thread.join()
    results[0].backward()
    there = x.detach().cpu().requires_grad_()
    there.softmax(-1).square().sum().backward()
    assert torch.equal(x.grad.cpu(), there.grad)  # type: ignore[union-attr, arg-type]


def test_random_numbers_follow_the_state_of_the_devices_generator() -> None:
    torch.cuda.manual_seed(3)
    first, second = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    state = torch.cuda.get_rng_state()
    third = torch.rand(5, device="cuda")
    before = torch.get_rng_state()
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), third)
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.randn(5, device="cuda"), first) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)  # the CPU's own numbers do not move


def test_a_kernel_without_emulation_fails_by_its_name() -> None:
    from torch.nn.functional import scaled_dot_product_attention

    query = torch.randn(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
    with pytest.raises((NotImplementedError, RuntimeError), match="attention"):
        scaled_dot_product_attention(query, query, query)
