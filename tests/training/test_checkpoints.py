"""How long a checkpoint took, by which a job knows when it has to begin its last one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.training.checkpoints import RUN_FILES, Checkpoints
from megatron_pmd.training.state import RunState
from tests.engine.only_rank import OnlyRank


@pytest.mark.parametrize(("writing", "counted"), [(0.3, 0.3), (0.0, 0.0), (3600.0, 1.0)])
def test_a_checkpoint_that_is_looked_for_late_has_not_taken_until_then(
    writing: float, counted: float, tmp_path: Path
) -> None:
    """The last case: not longer than since it was begun, whatever the files' times say."""
    taken: list[float] = []

    class Actor:
        def save(self, folder: Path, completed: int, run_state: dict[str, Any], write_more: Any) -> None:
            self.checkpoint = folder / f"iteration-{completed}"
            self.checkpoint.mkdir(parents=True)
            write_more(self.checkpoint)
            (self.checkpoint / "__0_0.distcp").write_bytes(bytes(9))
            begun = (self.checkpoint / f"run_{RUN_FILES[0]}").stat().st_mtime
            os.utime(self.checkpoint / "__0_0.distcp", (begun + writing, begun + writing))

        def publish_checkpoint(self, *, wait: bool) -> None: ...

    class Shutdown:
        def expect(self, phase: str, seconds: float) -> None:
            taken.append(seconds)

    for name in RUN_FILES:
        (tmp_path / name).write_text("{}")
    parts: list[Any] = [OnlyRank(), Actor(), Shutdown()]
    checkpoints = Checkpoints(tmp_path, *parts)
    checkpoints.begin(RunState())
    time.sleep(1)  # a rollout
    checkpoints.publish(wait=False)
    assert taken == [pytest.approx(counted, abs=0.25)]
