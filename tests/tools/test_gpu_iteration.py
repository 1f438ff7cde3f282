"""What gpu_check says of two whole iterations; the run itself is that of tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_pmd.data.problems import Problem
from tools.gpu_iteration import different_characters, figures_of, iterations


@pytest.mark.parametrize("shape", ["small", "large"])
def test_the_iterations_save_and_sync_and_have_groups_that_differ(tmp_path: Path, shape: str) -> None:
    (tmp_path / "shape").write_text(shape)
    config = iterations(tmp_path).resolved()
    assert config.checkpoint.every == 1 and config.iterations == 2 and config.layout.ranks == 1
    assert different_characters("aab", Problem(0, (), "")) == pytest.approx(2 / 3)
    assert different_characters("", Problem(0, (), "")) == 0


def test_the_figures_are_those_of_the_last_iteration(tmp_path: Path) -> None:
    ledger = [
        {"iteration": 0, "phase": "sync", "seconds": 9.0},
        {"iteration": 1, "phase": "rollout", "seconds": 2.0},
        {"iteration": 1, "phase": "sync", "seconds": 0.5},
        {"iteration": 1, "phase": "resume", "seconds": None},
        {"iteration": 2, "phase": "export", "seconds": 3.0},  # after the end
    ]
    difference = {
        "sync/mean_abs_difference": 0.01, "mismatch/p99_abs": 0.1, "sync/max_abs_difference": 0.7,
    }  # fmt: skip
    metrics = [
        {"kind": "iteration", "iteration": 0} | dict.fromkeys(difference, 5.0),
        {"kind": "step", "iteration": 1},
        {"kind": "iteration", "iteration": 1} | difference,
    ]
    for name, lines in (("ledger", ledger), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures_of(tmp_path) == {
        "seconds of rollout": 2.0,
        "seconds of sync": 0.5,
        "mean difference": 0.01,
        "p99": 0.1,
        "largest": 0.7,
    }
