"""What a node of a job takes from the environment."""

from __future__ import annotations

import pytest

from megatron_pmd.node import main


def test_the_run_is_called_pmd_name_whatever_its_recipe_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMD_RECIPE", "tiny_moe_cpu")
    monkeypatch.setenv("PMD_NAME", "2026")  # JSON's reader would make a number of it
    monkeypatch.setenv("PMD_SETTINGS", "algorithm.tau=0.5")
    config = main._configuration()
    assert (config.name, config.algorithm.tau) == ("2026", 0.5)
