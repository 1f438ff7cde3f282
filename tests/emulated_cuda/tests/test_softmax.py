"""The scaled, masked softmaxes and their gradients against torch.softmax and autograd in float64."""

from __future__ import annotations

import pytest
import torch
import transformer_engine_torch as tex

SCALE = 0.5


def masked(kind: str, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if kind == "":
        return scores
    if kind == "_masked":
        return scores.masked_fill(mask, -torch.inf)
    shift = 1 if kind == "_upper_triang_masked" else 1 + scores.shape[-1] - scores.shape[-2]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(shift)
    return scores.masked_fill(later, -torch.inf)


@pytest.mark.parametrize("kind", ["", "_masked", "_upper_triang_masked", "_aligned_causal_masked"])
def test_a_scaled_softmax_is_torchs_and_has_its_gradient(kind):
    shape = (6, 8, 8) if kind == "_upper_triang_masked" else (2, 3, 4, 8)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(n)).bfloat16().cuda() for n in (0, 1)]
    mask = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(2)).cuda() < 0.3
    more = (mask,) if kind == "_masked" else ()
    out = getattr(tex, f"scaled{kind}_softmax_forward")(drawn[0], *more, SCALE)
    leaf = drawn[0].double().requires_grad_()
    exact = masked(kind, leaf * SCALE, mask).softmax(-1)
    exact.backward(drawn[1].double())
    gradient = getattr(tex, f"scaled{kind}_softmax_backward")(drawn[1], out, SCALE)
    assert out.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact.detach(), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=2**-6, atol=4e-3)


def test_a_row_whose_keys_are_all_masked_becomes_zero():
    scores, mask = torch.randn(1, 1, 2, 8).bfloat16().cuda(), torch.zeros(1, 1, 2, 8, dtype=torch.bool).cuda()
    mask[0, 0, 1] = True
    out = tex.scaled_masked_softmax_forward(scores, mask, SCALE)
    assert not out[0, 0, 1].any() and out[0, 0, 0].all()
