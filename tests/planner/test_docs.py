"""The figures of docs/recipes.md are those the planner gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.planning import make_plan
from megatron_pmd.planner.split import iteration_seconds
from recipes import RECIPES, recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def row(name: str) -> str:
    plan = make_plan(recipe(name), load_cluster("h100").machines)
    phases = " / ".join(f"{sum(owners.values()) / 1e9:.0f}" for owners in plan.phases.values())
    cells = [
        f"`{name}`",
        f"{plan.shape.total / 1e9:,.2f}B",
        f"{plan.shape.active / 1e9:.2f}B",
        str(plan.config.devices),
        f"{phases} GB",
        f"{plan.host_bytes / 1e9:.0f}",
        f"{plan.cache.tokens:,}",
        f"{plan.checkpoint_bytes / 1e9:,.0f} GB",
        f"{iteration_seconds(plan):.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_cpu")])
def test_the_page_has_the_planners_figures(name: str) -> None:
    assert row(name) in PAGE.read_text(), f"write this row into docs/recipes.md:\n{row(name)}"


if __name__ == "__main__":
    print("\n".join(row(name) for name in sorted(RECIPES) if not name.endswith("_cpu")))
