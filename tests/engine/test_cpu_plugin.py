"""How an engine on a CPU draws by a request's seed; its plugin is loaded as SGLang loads it, by its file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "megatron_pmd" / "engine" / "cpu" / "sglang_cpu_plugin.py"


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sglang_cpu_plugin", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_candidates_are_drawn_as_often_as_they_weigh_and_those_of_weight_0_never(plugin: ModuleType) -> None:
    """20,000 draws: a share p has a standard error of √(p(1 − p)/20,000), at most 0.0035."""
    weights, rows = torch.tensor([0.0, 0.2, 0.0, 1.2, 0.6, 0.0]), 20_000
    positions = torch.arange(rows)
    drawn = plugin.draw(weights.log().expand(rows, -1), torch.full((rows,), 3), positions)
    assert drawn.shape == (rows, 1)
    shares = drawn.view(-1).bincount(minlength=6) / rows
    torch.testing.assert_close(shares, weights / 2, atol=0.014, rtol=0)
    assert shares[weights == 0].sum() == 0


def test_a_row_is_drawn_by_its_seed_and_position_whatever_the_other_rows_are(plugin: ModuleType) -> None:
    torch.manual_seed(0)
    log_probs, seeds, positions = torch.randn(40, 500), torch.arange(40) * 7, torch.arange(40) % 5
    together = plugin.draw(log_probs, seeds, positions)
    alone = torch.cat(
        [plugin.draw(log_probs[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(40)]
    )
    assert torch.equal(together, alone)
    assert not torch.equal(together, plugin.draw(log_probs, seeds + 1, positions))
    assert not torch.equal(together, plugin.draw(log_probs, seeds, positions + 1))
