from __future__ import annotations

from pathlib import Path

import torch

from megatron_pmd.config import override
from megatron_pmd.node.worker import prepare_model
from recipes import recipe

RECIPE = """
def make(folder):
    import torch
    torch.manual_seed(0)
    folder.mkdir()
    torch.save(torch.rand(3), folder / "weights")
"""


def test_a_model_that_is_made_leaves_the_runs_random_numbers_as_they_were(tmp_path: Path) -> None:
    """Else adapters would start otherwise in the run that made it than in the same run made again."""
    (tmp_path / "mine.py").write_text(RECIPE)
    words = [f"model.path={tmp_path / 'model'}", f"model.prepare={tmp_path / 'mine.py'}:make"]
    before = torch.get_rng_state()
    prepare_model(override(recipe("tiny_moe_cpu"), words))
    assert (tmp_path / "model" / "weights").exists()
    assert torch.equal(torch.get_rng_state(), before)
