"""Transformer Engine's router functions on the device against megatron-core's unfused ones, with autograd."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from transformer_engine.pytorch import router

TOKENS, EXPERTS, TOP_K = 7, 8, 3


def logits() -> torch.Tensor:
    drawn = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    return drawn.cuda().requires_grad_()


def assert_same(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "before", "top_k", "groups", "biased", "factor"),
    [
        ("softmax", True, TOP_K, None, False, None),
        ("softmax", False, TOP_K, None, False, 2.5),
        ("softmax", True, 4, (4, 2), False, None),
        ("sigmoid", False, TOP_K, None, True, 2.5),
        ("sigmoid", False, 1, None, False, None),
        ("sigmoid", False, 4, (4, 2), True, None),
        ("sqrtsoftplus", False, TOP_K, None, True, None),
    ],
)
def test_the_chosen_experts_and_their_probabilities_are_megatrons(
    function, before, top_k, groups, biased, factor
):
    bias = torch.linspace(-0.3, 0.3, EXPERTS).cuda() if biased else None
    weights = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).cuda()
    of_groups = (
        dict(num_groups=groups[0], group_topk=groups[1]) if groups else dict(num_groups=None, group_topk=None)
    )
    ours, theirs = logits(), logits()
    probs, routing_map = router.fused_topk_with_score_function(
        ours, top_k, before, scaling_factor=factor, score_function=function, expert_bias=bias, **of_groups
    )
    expected, expected_map = moe_utils.topk_routing_with_score_function(
        theirs, top_k, before, scaling_factor=factor, score_function=function, expert_bias=bias, **of_groups
    )
    (probs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert routing_map.dtype == torch.bool and torch.equal(routing_map, expected_map)
    assert_same([probs, ours.grad], [expected, theirs.grad])


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_balancing_losss_scores_are_megatrons(function):
    weights = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).cuda()
    ours, theirs = logits(), logits()
    routing_map, scores = router.fused_compute_score_for_moe_aux_loss(ours, TOP_K, function)
    expected_map, expected = moe_utils.compute_routing_scores_for_aux_loss(theirs, TOP_K, function)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(routing_map, expected_map)
    assert_same([scores, ours.grad], [expected, theirs.grad])


@pytest.mark.parametrize("on_device", [False, True])
def test_the_balancing_loss_is_megatrons(on_device):
    ours, theirs = logits(), logits()
    counts = torch.arange(EXPERTS).cuda() + 1
    tokens = torch.tensor(TOKENS).cuda() if on_device else TOKENS
    loss = router.fused_moe_aux_loss(ours, counts, tokens, EXPERTS, TOP_K, 0.01)
    expected = moe_utils.switch_load_balancing_loss_func(theirs, counts, TOKENS, TOP_K, EXPERTS, 0.01)
    (3 * loss).backward()
    (3 * expected).backward()
    assert_same([loss, ours.grad], [expected, theirs.grad])
