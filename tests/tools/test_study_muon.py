"""The study's runs differ in the optimizer alone, and the first seed alone chooses the rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import DataError
from recipes import recipe
from tools.studies.muon import TASKS, best_rate, configuration, run_all, start_of

RATES = TASKS["tiny"].rates


@pytest.mark.parametrize("name", TASKS)
def test_the_runs_of_both_optimizers_differ_in_nothing_else(name: str, tmp_path: Path) -> None:
    task = TASKS[name]

    def without_optimizer(config: RunConfig) -> dict:
        found = config.model_dump()
        assert found["model"].pop("path") in (recipe(task.recipe).model.path, str(start_of(tmp_path)))
        optimizer = found.pop("optimizer")
        assert optimizer.pop("name") in ("adam", "muon")
        return found | optimizer

    adam, muon = (configuration(task, optimizer, tmp_path, 4e-4, 1) for optimizer in ("adam", "muon"))
    assert (adam.optimizer.name, muon.optimizer.name) == ("adam", "muon")
    assert muon.model.path == (str(start_of(tmp_path)) if task.supervised else adam.model.path)
    assert without_optimizer(adam) == without_optimizer(muon)


def test_the_rate_is_the_best_of_the_first_seed_whatever_the_others_reach() -> None:
    found = {
        ("adam", RATES[0]): {0: [0.2, 0.9, 0.5]},
        ("adam", RATES[1]): {0: [0.2, 0.5, 0.6], 1: [0.2, 0.3, 0.1]},
        ("adam", RATES[2]): {1: [0.2, 0.9, 0.9]},
        ("muon", RATES[3]): {0: [0.2, 0.9, 0.9]},
    }
    assert best_rate(found, "adam") == RATES[1]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no run of muon with seed 0"):
        best_rate({}, "muon")


def test_muon_without_the_start_that_adam_writes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the study of adam first"):
        run_all(TASKS["tiny"], tmp_path, "muon", RATES, [0])
