"""What a run notes for the next start."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_pmd.training import phases
from megatron_pmd.training.state import RunState
from megatron_pmd.training.trainer import Trainer
from recipes import recipe


class Drawn:
    """In the place of ProblemSets: how many prompts and examples are drawn."""

    def __init__(self) -> None:
        self.counts = {"prompts": 0, "supervised": 0}
        self.train = SimpleNamespace(state=lambda: self.counts["prompts"])

    def state(self) -> dict[str, int]:
        return dict(self.counts)


@pytest.mark.parametrize("ahead", [[], ["a group of the next rollout"]])
def test_a_save_within_an_iteration_notes_what_is_ahead_and_takes_back_what_it_draws_again(
    ahead: list[Any], tmp_path: Path
) -> None:
    saved: list[RunState] = []
    problems: Any = Drawn()
    rollouts = SimpleNamespace(ahead=list, refresh=lambda: None)
    parts: dict[str, Any] = dict.fromkeys(("control", "actor", "log", "tokenizer", "shutdown"), Mock())
    run = Trainer(
        recipe("tiny_moe_cpu"), tmp_path, rollouts=rollouts, problem_sets=problems, state=RunState(), **parts
    )
    run.checkpoints = Mock(begin=lambda state: saved.append(copy.deepcopy(state)))
    problems.counts = {"prompts": 5, "supervised": 7}
    run.begin_iteration()
    problems.counts = {"prompts": 13, "supervised": 9}  # by now
    rollouts.ahead = lambda: ahead
    phases.save(run)
    assert saved[0].ahead == ahead
    assert saved[0].prompts == {"prompts": 13 if ahead else 5, "supervised": 7}
