"""The run directory that most of these tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_pmd.observe.journal import Journal
from megatron_pmd.outcome import RunOutcome, Status
from tests.observe.synthetic_run import log_evaluation, make_config, run_iterations

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Six iterations, evaluations before 0 and 3 and after the last; every response ends in `extra`."""

    def make(extra: str = "") -> Path:
        config = make_config()
        folder = tmp_path / "runs" / config.name
        journal = Journal.open(folder, config, 0)
        with journal.phase("start"):
            pass
        for step in range(5):
            journal.log("warm_start", {"step": step, "loss": 2.0 / (1 + step)})
        run_iterations(journal, 0, config.iterations, extra)
        journal.iteration(config.iterations)
        with journal.phase("evaluate"):
            log_evaluation(journal, config.iterations, extra)
        journal.finish(RunOutcome(Status.COMPLETE))
        return folder

    return make
