"""Auxiliary and z-loss of the routers against their formulas, by transformers and autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.actor import settings
from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError
from tests.actor.launch import launch
from tests.actor.reference import as_in_files
from tests.actor.tiny_models import config_for, rollout

AUXILIARY, Z = 0.5, 0.25
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one process": {}},
    2: {"tensor=2, expert=2": dict(tensor=2, expert=2), "expert=2, data=2": dict(expert=2, data=2),
        "pipeline=2": dict(pipeline=2)},
}  # fmt: skip


def router_logits(model: Any, tokens: list[int], positions: list[int]) -> list[torch.Tensor]:
    """[tokens, experts] of each layer."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, inputs: found.append(inputs[0].flatten(0, -2) @ gate.weight.T)
        )
        for layer in model.model.layers
    ]
    model(torch.tensor([tokens]), position_ids=torch.tensor([positions]))
    for hook in hooks:
        hook.remove()
    return found


def expected_gradient(path: Path, rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """Of Σ over rows and layers of T (a E/(k T²) Σ_i n_i Σ_t p_ti + z/T Σ_t (log Σ_i exp x_ti)²) / Σ T.

    n_i tokens go to expert i; p are the softmax of the logits x. Switch Transformer (arXiv 2101.03961) eqs. 4
    to 6, for k experts a token; ST-MoE (arXiv 2202.08906) eq. 5. Padding is routed, and counted, too: its
    tokens are 0, its positions, too.
    """
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    samples, chosen = rollout(), model.config.num_experts_per_tok
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for numbers, padding in rows:
        sequences = [samples[i].tokens.tolist() for i in numbers]
        parts = [router_logits(model, sequence, list(range(len(sequence)))) for sequence in sequences]
        if padding:
            parts.append(router_logits(model, [0] * padding, [0] * padding))
        for logits in (torch.cat(layer) for layer in zip(*parts, strict=True)):
            length, experts = logits.shape
            scores = logits.softmax(-1)
            sent = torch.zeros(experts, dtype=torch.float64)
            sent.index_add_(
                0, scores.topk(chosen, -1).indices.flatten(), torch.ones(length * chosen).double()
            )
            balance = experts / (chosen * length**2) * (sent * scores.sum(0)).sum()
            total = total + length * (AUXILIARY * balance + Z * logits.logsumexp(-1).square().mean())
        tokens += sum(len(sequence) for sequence in sequences) + padding
    (total / tokens).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return as_in_files(found)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_the_routers_losses_are_means_over_tokens_whatever_the_objective_counts(ranks, models):
    found = launch(
        "router_losses", ranks=ranks, module="tests.actor.router_loss_programs",
        path=models / "qwen3moe", layouts=LAYOUTS[ranks],
    )  # fmt: skip
    for name, layout in LAYOUTS[ranks].items():
        replicas = found if "data" in layout else found[:1]
        rows = [row for rank in replicas for row in rank[name][0]]
        assert sorted(i for samples, _ in rows for i in samples) == list(range(16))
        expected = expected_gradient(models / "qwen3moe", rows)
        for counts, gradient in found[0][name][1].items():
            for tensor, right in expected.items():
                difference = float((gradient[tensor].double() - right).abs().max() / right.abs().max())
                assert difference < 1e-5, (name, counts, tensor, difference)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ('{"moe_aux_loss_coeff": 0.01}', "does nothing alone"),
        ('{"moe_router_load_balancing_type": "seq_aux_loss"}', "for one sequence; use aux_loss"),
        ('{"moe_router_load_balancing_type": ["global_aux_loss"]}', "number of data-parallel replicas"),
        ('{"moe_router_load_balancing_type": ["aux_loss"]}', "give one kind, as text"),
    ],
)
def test_a_loss_of_the_routers_that_is_not_what_its_name_says_is_refused(chosen, message):
    config = override(config_for(Path("model")), [f"actor.megatron={chosen}"])
    with pytest.raises(ConfigError, match=message):
        settings.transformer_fields(config)
