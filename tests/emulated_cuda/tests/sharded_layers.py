"""A rank of test_sharded_layers.py: layers whose weights and tokens are shared out, with every recipe."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import transformer_engine.pytorch as te

from tests.emulated_cuda.tests.formats import Matrix, matrix, relative
from tests.emulated_cuda.tests.rounding import BF16, RECIPES, Rounding

TOKENS, INNER, OUTER = 128, 128, 256
"""Of one rank: blockwise scaling gathers bytes only where every rank has whole blocks of tokens."""


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(name: str, found: torch.Tensor | None, expected: Matrix) -> None:
    assert found is not None
    if (error := relative(found, expected)) > 2 * BF16:
        raise SystemExit(f"{name}: {error:.1e} from what the recipe gives")


def layer_of(mode: str, ranks: int, group: Any) -> Any:
    """A layer of which this rank has a part: of the outputs (column) or of the inputs (row)."""
    sizes = (INNER, OUTER * ranks) if mode == "column" else (INNER * ranks, OUTER)
    return te.Linear(
        *sizes, bias=False, params_dtype=torch.bfloat16, device="cuda",
        parallel_mode=mode, tp_group=group, tp_size=ranks, sequence_parallel=True,
    )  # fmt: skip


def run(mode: str, name: str, rank: int, ranks: int) -> None:
    kind, rounding = RECIPES[name]
    layer = layer_of(mode, ranks, torch.distributed.group.WORLD)
    weights = [random(*layer.weight.shape, seed=10 + r) for r in range(ranks)]
    with torch.no_grad():
        layer.weight.copy_(weights[rank])
    # A column's ranks have tokens each, and outputs of all; a row's have all tokens, and outputs of theirs.
    wide, long = (INNER, TOKENS) if mode == "column" else (INNER, TOKENS * ranks)
    xs = [random(long, wide, seed=20 + r) for r in range(ranks)]
    long_out = TOKENS * ranks if mode == "column" else TOKENS
    upstreams = [random(long_out, OUTER, seed=30 + r) for r in range(ranks)]
    x = xs[rank].cuda().requires_grad_()
    with te.autocast(enabled=kind is not None, recipe=kind and kind(), amax_reduction_group=None):
        output = layer(x)
    output.backward(upstreams[rank].cuda())
    expected = (_of_column if mode == "column" else _of_row)(rounding, xs, weights, upstreams, rank)
    found = {"output": output, "input": x.grad, "weight": layer.weight.grad}
    for part, wanted in zip(found, expected, strict=True):
        check(f"{mode}, {name}: the {part}", found[part], wanted)


def _of_column(
    rounding: Rounding,
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    upstreams: list[torch.Tensor],
    rank: int,
) -> tuple[Matrix, Matrix, Matrix]:
    """All tokens times the rank's rows of the weight; gradients of the tokens are summed over the ranks."""
    x = np.concatenate([matrix(part) for part in xs])
    each = [
        rounding.products(x, matrix(weight), matrix(upstream))
        for weight, upstream in zip(weights, upstreams, strict=True)
    ]
    of_x = np.sum([products[1] for products in each], axis=0)
    return each[rank][0], of_x[rank * TOKENS : (rank + 1) * TOKENS], each[rank][2]


def _of_row(
    rounding: Rounding,
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    upstreams: list[torch.Tensor],
    rank: int,
) -> tuple[Matrix, Matrix, Matrix]:
    """The rank's columns times the weight's, summed over the ranks; gradients of the outputs are gathered."""
    upstream = np.concatenate([matrix(part) for part in upstreams])
    each = [
        rounding.products(matrix(x), matrix(weight), upstream) for x, weight in zip(xs, weights, strict=True)
    ]
    output = np.sum([products[0] for products in each], axis=0)
    return output[rank * TOKENS : (rank + 1) * TOKENS], each[rank][1], each[rank][2]


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    for mode in ("column", "row"):
        for name in RECIPES:
            run(mode, name, rank, ranks)
    torch.distributed.barrier()
    print(f"rank {rank}: done")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
