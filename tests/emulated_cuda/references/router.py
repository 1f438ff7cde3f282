"""Scores of experts, the choice of each token's experts, and the loss that balances them.

Answers transformer_engine_torch's csrc/extensions/router.cpp with common/fused_router/. Computed in fp32.
Routing maps are bool [tokens, experts] (`bytemap`). Of equal scores the expert with the lower number is
chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import refuse_unless
from .host import on_the_host
from .registry import reference

EPSILON = 1e-20
"""Added to a sum before a score is divided by it."""


def scored(logits: Tensor, function: str) -> Tensor:
    """fp32 scores of logits; of softmax's over all experts."""
    if function == "softmax":
        return logits.float().softmax(-1)
    if function == "sigmoid":
        return logits.float().sigmoid()
    return torch.nn.functional.softplus(logits.float()).sqrt()


def best(scores: Tensor, number: int) -> Tensor:
    """int64 [..., number]: from the highest score on."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :number]


def within_best_groups(scores: Tensor, number: int, groups: int, chosen_groups: int) -> Tensor:
    """-inf outside of the groups whose best number / chosen_groups scores have the largest sums."""
    grouped = scores.unflatten(-1, (groups, -1))
    sums = grouped.gather(-1, best(grouped, number // chosen_groups)).sum(-1)
    inside = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, best(sums, chosen_groups), True)
    return grouped.masked_fill(~inside[..., None], -torch.inf).flatten(-2)


def one_format(kernel: str, routing_map_format: int, topk_indices: Any) -> None:
    refuse_unless(
        int(routing_map_format) == 0 and topk_indices is None, kernel, "other routing maps than bytes"
    )


@reference("fused_topk_with_score_function_fwd")
@on_the_host
def fused_topk_with_score_function_fwd(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: int | None, group_topk: int | None,
    scaling_factor: float | None, score_function: str, expert_bias: Tensor | None,
    routing_map_format: int = 0, topk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(probabilities, 0 where an expert is not chosen; routing map; fp32 that the backward pass needs).

    The bias decides the choice, not the probability. Sigmoid's scores of a token are divided by their sum.
    """
    one_format("fused_topk_with_score_function_fwd", routing_map_format, topk_indices)
    softmax = score_function == "softmax"
    scores = logits.float() if softmax and not use_pre_softmax else scored(logits, score_function)
    ranked = scores if expert_bias is None else scores + expert_bias
    if group_topk and group_topk > 0:
        assert num_groups is not None
        ranked = within_best_groups(ranked, topk, num_groups, group_topk)
    experts = best(ranked, topk)
    chosen = scores.gather(-1, experts)
    saved = logits.float() if score_function == "sqrtsoftplus" else scores
    if softmax and not use_pre_softmax:
        chosen = chosen.softmax(-1)
        saved = torch.full_like(scores, -torch.inf).scatter_(-1, experts, chosen)
    elif not softmax and topk > 1:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + EPSILON)
    factor = 1.0 if scaling_factor is None else scaling_factor
    probs = torch.zeros_like(scores).scatter_(-1, experts, chosen * factor).to(logits.dtype)
    routing_map = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, experts, True)
    return probs, routing_map, saved.contiguous()


@reference("fused_topk_with_score_function_bwd")
@on_the_host
def fused_topk_with_score_function_bwd(
    routing_map: Tensor, intermediate_output: Tensor, grad_probs: Tensor, grad_logits: Tensor, topk: int,
    use_pre_softmax: bool, scaling_factor: float | None, score_function: str, use_dense_indices: bool = False,
    routing_map_format: int = 0,
) -> None:  # fmt: skip
    """Writes the gradient of the logits."""
    one_format("fused_topk_with_score_function_bwd", routing_map_format, True if use_dense_indices else None)
    routed = routing_map.bool()
    gradient = grad_probs.float() * (1.0 if scaling_factor is None else scaling_factor)
    gradient = gradient.masked_fill(~routed, 0)
    if score_function == "softmax":
        weights = intermediate_output if use_pre_softmax else intermediate_output.masked_fill(~routed, 0)
        gradient = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
    else:
        scores = intermediate_output
        if score_function == "sqrtsoftplus":
            scores = scored(intermediate_output, score_function)
        if topk > 1:
            gradient = of_normalised(gradient, scores, routed)
        gradient = of_score(gradient, intermediate_output, scores, score_function)
    grad_logits.copy_(gradient)


def of_normalised(gradient: Tensor, scores: Tensor, routed: Tensor) -> Tensor:
    """The gradient of the chosen scores, of that of their shares of their sum."""
    kept = scores.masked_fill(~routed, 0)
    whole = kept.sum(-1, keepdim=True) + EPSILON
    both = (gradient * kept).sum(-1, keepdim=True)
    return (gradient / whole - both / whole.square()).masked_fill(~routed, 0)


def of_score(gradient: Tensor, saved: Tensor, scores: Tensor, function: str) -> Tensor:
    """The gradient of a logit: `saved` is the score itself, of sqrtsoftplus the logit."""
    if function == "sigmoid":
        return gradient * saved * (1 - saved)
    slope = torch.where(saved > 20, 1.0, saved.sigmoid())
    return gradient * slope / (2 * scores + EPSILON)


@reference("fused_score_for_moe_aux_loss_fwd")
@on_the_host
def fused_score_for_moe_aux_loss_fwd(
    logits: Tensor, topk: int, score_function: str, routing_map_format: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(fp32 scores of all experts, of sum 1; routing map of the best; what the backward pass needs)."""
    one_format("fused_score_for_moe_aux_loss_fwd", routing_map_format, None)
    scores = scored(logits, score_function)
    saved = logits.float() if score_function == "sqrtsoftplus" else scores.clone()
    if score_function != "softmax":
        scores = scores / (scores.sum(-1, keepdim=True) + EPSILON)
    routing_map = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, best(scores, topk), True)
    return scores, routing_map, saved


@reference("fused_score_for_moe_aux_loss_bwd")
@on_the_host
def fused_score_for_moe_aux_loss_bwd(
    intermediate_output: Tensor, grad_scores: Tensor, grad_logits: Tensor, topk: int, score_function: str
) -> None:
    """Writes the gradient of the logits."""
    saved, gradient = intermediate_output, grad_scores.float()
    if score_function == "softmax":
        grad_logits.copy_(saved * (gradient - (saved * gradient).sum(-1, keepdim=True)))
        return
    scores = scored(saved, score_function) if score_function == "sqrtsoftplus" else saved
    gradient = of_normalised(gradient, scores, torch.ones_like(scores, dtype=torch.bool))
    grad_logits.copy_(of_score(gradient, saved, scores, score_function))


@reference("fused_moe_aux_loss_fwd")
@on_the_host
def fused_moe_aux_loss_fwd(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: int, num_experts: int, num_rows: int,
    num_cols: int, topk: int, coeff: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, scalar as probs; fp32 [factor, loss]): factor · Σ_e (Σ_t probs) · tokens_per_expert.

    The factor is experts · coeff / (topk · tokens²).
    """
    factor = num_experts * coeff / topk / total_num_tokens / total_num_tokens
    loss = (probs.float().sum(0) * tokens_per_expert.float()).sum() * factor
    return loss.to(probs.dtype), torch.stack((torch.tensor(factor, dtype=torch.float32), loss))


@reference("fused_moe_aux_loss_fwd_graph_safe")
def fused_moe_aux_loss_fwd_graph_safe(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: Tensor, num_experts: int, num_rows: int,
    num_cols: int, topk: int, coeff: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fused_moe_aux_loss_fwd with the number of tokens on the device."""
    tokens = int(total_num_tokens)
    return fused_moe_aux_loss_fwd(
        probs, tokens_per_expert, tokens, num_experts, num_rows, num_cols, topk, coeff
    )


@reference("fused_moe_aux_loss_bwd")
@on_the_host
def fused_moe_aux_loss_bwd(
    Const_buf: Tensor, tokens_per_expert: Tensor, num_rows: int, num_cols: int, grad_aux_loss: Tensor
) -> Tensor:
    """[num_rows, num_cols]: the same for every token."""
    row = Const_buf[0] * tokens_per_expert.float() * grad_aux_loss.float()
    return row.to(grad_aux_loss.dtype).expand(num_rows, num_cols).contiguous()
