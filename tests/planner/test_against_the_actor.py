"""The planner's bytes are those that a real megatron-core actor of the tiny recipe holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.config import override
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.planning import make_plan
from recipes import recipe
from recipes.tiny_moe_cpu import make_model
from tests.actor.launch import launch

pytestmark = pytest.mark.slow
PRECISIONS = ["fp32", "bf16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-moe"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(model: Path) -> list[dict[str, dict[str, int]]]:
    return launch("held", ranks=2, module="tests.planner.measured", folder=model, precisions=PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_gradients_and_optimizer_are_as_planned(
    precision: str, model: Path, ranks: list[dict[str, dict[str, int]]]
) -> None:
    """The two ranks share the dense parameters' optimizer state unevenly, by padding; its sum is exact."""
    config = override(recipe("tiny_moe_cpu"), [f"model.path={model}", f"model.precision={precision}"])
    (stage,) = make_plan(config, load_cluster("lab").machines).stages
    for rank in ranks:
        assert rank[precision]["weights"] == stage.weight_bytes
        assert rank[precision]["gradients"] == stage.gradient_bytes
    assert sum(rank[precision]["optimizer"] for rank in ranks) == 2 * stage.optimizer_bytes
