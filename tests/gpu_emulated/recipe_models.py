"""transformers on the rows that an actor takes, and in float64 with the products of an FP8 recipe.

Written from the definitions of the recipes and of the formats: every linear layer rounds its input, its
weight and the gradient of its output to FP8 with their scales, and multiplies what is then left in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from megatron_pmd.batch import RolloutBatch
from tests.actor.reference import Reference, as_in_files, force
from tests.actor.tiny_models import TEMPERATURE

BLOCK = 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32, as all recipes keep their scales: the largest of the format / amax; 1 where there is no amax."""
    limit = torch.full_like(amax, torch.finfo(dtype).max, dtype=torch.float32)
    return torch.where(amax > 0, limit / amax.float(), 1.0).double()


def rounded(values: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """float64 of the nearest code of values · scale, saturating, over the scale."""
    limit = torch.finfo(dtype).max
    return (values * scale).clamp(-limit, limit).to(dtype).double() / scale


def by_tiles(
    values: Tensor, dtype: torch.dtype, height: int, width: int, *, powers_of_two: bool = False
) -> Tensor:
    """`rounded` with a scale for each tile of [height, width]; those at the edge are smaller."""
    rows, columns = values.shape
    whole = pad(values, (0, -columns % width, 0, -rows % height))
    tiles = whole.reshape(whole.shape[0] // height, height, whole.shape[1] // width, width)
    scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), dtype)
    if powers_of_two:
        scale = scale.log2().floor().exp2()
    return rounded(tiles, dtype, scale).reshape(whole.shape)[:rows, :columns]


@dataclass
class Recipe:
    """An FP8 recipe with E4M3 forward and E5M2 for gradients.

    `round` gives an operand of a layer twice: for the product that sums over its columns, and for the one
    that sums over its rows (the gradient of the weight; of a weight, that of the input).
    """

    forward: torch.dtype = E4M3
    backward: torch.dtype = E5M2

    def round(self, layer: str, operand: str, values: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.backward if operand == "gradient" else self.forward
        return self._round(layer, operand, values, dtype)

    def _round(self, layer: str, operand: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass
class Tensorwise(Recipe):
    """A scale for each operand, of its own largest magnitude."""

    unscaled: str = ""
    """The operand whose scale is forgotten."""

    def _round(self, layer: str, operand: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        amax = values.abs().amax()
        scale = torch.ones_like(amax) if operand == self.unscaled else scale_of(amax, dtype)
        return (rounded(values, dtype, scale),) * 2


@dataclass
class Delayed(Recipe):
    """A scale for each operand of a layer, of its largest magnitude in all passes before; 1 in the first."""

    seen: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def _round(self, layer: str, operand: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        before = self.seen.get((layer, operand), torch.zeros((), dtype=torch.float64))
        self.seen[layer, operand] = torch.maximum(before, values.abs().amax())
        return (rounded(values, dtype, scale_of(before, dtype)),) * 2


@dataclass
class Blockwise(Recipe):
    """A scale for 128 values along the sum, of 128 x 128 in weights."""

    across: bool = False
    """Tiles of 128 values across the sum."""
    weight_tile: tuple[int, int] = (BLOCK, BLOCK)
    powers_of_two: bool = False
    """Scales are rounded down to one."""

    def _round(self, layer: str, operand: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tiles = partial(by_tiles, values, dtype, powers_of_two=self.powers_of_two)
        if operand == "weight":
            return (tiles(*self.weight_tile),) * 2
        ways = tiles(1, BLOCK), tiles(BLOCK, 1)
        return (ways[1], ways[0]) if self.across else ways


class Product(torch.autograd.Function):
    """x [rows, in] times weight [out, in] transposed, with operands that a recipe has rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, layer: str) -> Tensor:
        by_columns, x_by_rows = recipe.round(layer, "input", x)
        weight_by_columns, weight_by_rows = recipe.round(layer, "weight", weight)
        ctx.save_for_backward(x_by_rows, weight_by_rows)
        ctx.recipe, ctx.layer = recipe, layer
        return by_columns @ weight_by_columns.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        by_columns, by_rows = ctx.recipe.round(ctx.layer, "gradient", gradients[0])
        return by_columns @ weight, by_rows.T @ x, None, None


class OneProduct:
    """Linear layers that take the same input, as the one product that the actor makes of them."""

    def __init__(self, name: str, layers: Sequence[Any], recipe: Recipe) -> None:
        self.name, self.layers, self.recipe = name, layers, recipe
        for i, layer in enumerate(layers):
            layer.forward = partial(self.part, i)

    def part(self, i: int, x: Tensor) -> Tensor:
        """The output of the i-th; transformers calls them in order."""
        if i == 0:
            weight = torch.cat([layer.weight for layer in self.layers])
            whole = Product.apply(x.flatten(0, -2), weight, self.recipe, self.name)
            widths = [len(layer.weight) for layer in self.layers]
            self.parts = whole.unflatten(0, x.shape[:-1]).split(widths, -1)
        return self.parts[i]


class ExpertLayer(torch.nn.Module):
    """A linear layer of one expert, whose weight is a part of the tensor that holds those of all."""

    def __init__(self, part: Callable[[], Tensor]) -> None:
        super().__init__()
        self.part = part

    @property
    def weight(self) -> Tensor:
        return self.part()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def _weight_of(experts: Any, i: int, k: int) -> Tensor:
    """The i-th expert's gate, up-projection or down-projection."""
    return experts.down_proj[i] if k == 2 else experts.gate_up_proj[i].chunk(2)[k]


def split(experts: Any) -> list[Any]:
    """Let each expert compute by three layers of its own, which are called as in files."""
    numbers = [str(i) for i in range(experts.num_experts)]
    if hasattr(experts, "0"):
        return [experts.get_submodule(number) for number in numbers]
    for i, number in enumerate(numbers):
        expert = torch.nn.Module()
        for k, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            setattr(expert, name, ExpertLayer(partial(_weight_of, experts, i, k)))
        experts.add_module(number, expert)
    experts.forward = partial(experts_forward, experts)
    return [experts.get_submodule(number) for number in numbers]


def experts_forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The router's weights come in before the second product, as in the actor."""
    result = torch.zeros_like(hidden)
    for i in range(experts.num_experts):
        tokens, place = torch.where(chosen == i)
        if len(tokens) == 0:
            continue
        expert, own = experts.get_submodule(str(i)), hidden[tokens]
        gate, up = expert.gate_proj(own), expert.up_proj(own)
        inner = silu(gate) * up * weights[tokens, place, None].to(up.dtype)
        result = result.index_add(0, tokens, expert.down_proj(inner))
    return result


def take_recipe(model: Any, recipe: Recipe, layers: Iterable[int], *, fused: bool = True) -> None:
    """Let these layers of a Qwen3 model, dense or with experts, multiply as the recipe says.

    fused: the projections of one input are one operand, as in the actor.
    """
    for i in layers:
        attention, mlp = model.model.layers[i].self_attn, model.model.layers[i].mlp
        groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        for part in split(mlp.experts) if hasattr(mlp, "experts") else [mlp]:
            groups += [[part.gate_proj, part.up_proj], [part.down_proj]]
        if not fused:
            groups = [[layer] for group in groups for layer in group]
        for k, group in enumerate(groups):
            OneProduct(f"{i}.{k}", group, recipe)


def take_adapters(model: Any, adapters: dict[str, Tensor], scale: float) -> None:
    """Let linear layers add scale · B A x, which no recipe rounds; after take_recipe.

    adapters: matrices by peft's names. Layers that take the same input have one A, as in the actor. A and B
    become parameters of their layers, lora_A and lora_B.
    """
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            split(layer.mlp.experts)
    for name in sorted({name.rpartition(".lora_")[0] for name in adapters}):
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        group, _, last = name.rpartition(".")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last)
        of_group = model.get_submodule(f"{group}.{first}".removeprefix("base_model.model."))
        if not hasattr(of_group, "lora_A"):
            of_group.lora_A = torch.nn.Parameter(adapters[f"{name}.lora_A.weight"].to(layer.weight.dtype))
        layer.lora_B = torch.nn.Parameter(adapters[f"{name}.lora_B.weight"].to(layer.weight.dtype))
        layer.forward = partial(_adapted, layer.forward, of_group.lora_A, layer.lora_B, scale)


def _adapted(base: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    return base(x) + scale * x @ a.T @ b.T


@dataclass
class Numbers:
    loss: float
    """Mean over the sequences."""
    log_probs: Tensor
    """[tokens of the rollout], NaN at prompt tokens, at the sampling temperature."""
    gradient: dict[str, Tensor]
    """By Hugging Face name."""


class Rows:
    """A transformers model on the packed rows of an actor: see number_programs.one_place."""

    def __init__(self, folder: Path, reference: Reference, rows: list[dict[str, Any]], dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
        self.rows, self.anchor = rows, reference.anchor.double()
        batch = RolloutBatch.pack(reference.samples, TEMPERATURE)
        self.counted = torch.from_numpy(batch.tokens.counted)
        self.samples = reference.samples
        self.chosen: dict[int, Tensor] = {}
        if rows[0]["experts"] is not None:
            for number, layer in enumerate(self.model.model.layers):
                if hasattr(layer.mlp, "gate"):
                    force(layer.mlp, partial(self.chosen.__getitem__, number))

    def log_probs_of(self, row: dict[str, Any]) -> Tensor:
        """[response tokens] float64, of one forward pass; sequences do not see each other."""
        length, bounds = row["tokens"].shape[1], row["bounds"].long()
        sequence = torch.bucketize(torch.arange(length), bounds[1:], right=True)
        seen = (sequence[:, None] == sequence[None]).tril()
        mask = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill(~seen, -torch.inf)
        if row["experts"] is not None:
            experts = row["experts"].view(length, len(self.model.model.layers), -1)
            self.chosen |= dict(enumerate(experts.unbind(1)))
        positions = torch.arange(length) - bounds[sequence]
        logits = self.model(
            row["tokens"], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
        ).logits[0, row["rows"]]
        distribution = (logits.double() / TEMPERATURE).log_softmax(-1)
        return distribution.gather(1, row["targets"][:, None])[:, 0]

    def step(self) -> Numbers:
        """The loss and its gradient, accumulated over the rows in float64; moves no weight."""
        loss, log_probs = 0.0, torch.full_like(self.anchor, torch.nan)
        count = sum(len(row["samples"]) for row in self.rows)
        total: dict[str, Tensor] = {}
        for row in self.rows:
            found = self.log_probs_of(row)
            log_probs[row["source"]] = found.detach()
            part = self._loss(row, found)
            loss += float(part.detach())
            self.model.zero_grad()
            part.backward()
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0.0) + parameter.grad.double() / count
        return Numbers(loss / count, log_probs, as_in_files(total))

    def _loss(self, row: dict[str, Any], log_probs: Tensor) -> Tensor:
        """Σ (τ/2)(s − A/τ)² / |y|; s = Σ log π_θ − log π_t and |y| are over the tokens that count."""
        samples = [self.samples[i] for i in row["samples"]]
        tau, advantage = (
            torch.tensor([getattr(sample, name) for sample in samples], dtype=torch.float64)
            for name in ("tau", "advantage")
        )
        counts = self.counted[row["source"]].double()
        ratio = (log_probs - self.anchor[row["source"]]) * counts
        zero = torch.zeros_like(tau)
        s = zero.index_add(0, row["sequence"], ratio)
        tokens = zero.index_add(0, row["sequence"], counts)
        return (tau / 2 * (s - advantage / tau).square() / tokens).sum()
