"""Two ranks that share a layer's weights and tokens, with every recipe, against one in float64."""

from __future__ import annotations

from tests.emulated_cuda.tests.launched import launch


def test_layers_that_gather_and_scatter_in_fp8_are_the_products_of_their_recipe() -> None:
    for rank, (code, output) in enumerate(launch("sharded_layers", ranks=2)):
        assert code == 0 and f"rank {rank}: done" in output, output[-2000:]
