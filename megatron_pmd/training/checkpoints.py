"""A run's checkpoints: what goes into one, when it is complete, and how long that took."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megatron_pmd.actor.actor import Actor
from megatron_pmd.distributed import Control
from megatron_pmd.rollout.carried_over_file import write_carried_over
from megatron_pmd.rollout.groups import Group
from megatron_pmd.training.shutdown import Shutdown
from megatron_pmd.training.state import RunState

RUN_FILES = ("config.json", "versions.json")


class Checkpoints:
    """Collective, as the actor's own methods are."""

    def __init__(self, folder: Path, control: Control, actor: Actor, shutdown: Shutdown) -> None:
        """folder: of the run."""
        self._folder, self._control, self._actor, self._shutdown = folder, control, actor, shutdown
        self._under_way: tuple[Path, float, float] | None = None
        """Where, when it was begun, and how many seconds training stood still for it."""

    def path(self, completed: int) -> Path:
        """Of the checkpoint after so many iterations."""
        return self._folder / "checkpoints" / f"iteration-{completed}"

    def begin(self, state: RunState) -> None:
        """Begin a checkpoint of the run as it stands; it appears when it is complete."""
        completed, carried_over = state.completed, [*state.carried_over, *state.ahead]
        begun = time.monotonic()
        run_state = self._control.from_driver({"iteration": completed, **state.prompts})
        self._actor.save(
            self._folder / "checkpoints", completed, run_state,
            lambda checkpoint: self._write_more(checkpoint, carried_over),
        )  # fmt: skip
        self._under_way = self.path(completed), begun, time.monotonic() - begun

    def _write_more(self, checkpoint: Path, carried_over: list[Group]) -> None:
        write_carried_over(checkpoint, carried_over)
        for name in RUN_FILES:  # a copy of the checkpoint alone then says what it is
            shutil.copyfile(self._folder / name, checkpoint / f"run_{name}")

    def publish(self, *, wait: bool) -> None:
        """Publish a complete checkpoint; its time counts whole although it is written beside other phases."""
        self._actor.publish_checkpoint(wait=wait)
        if self._under_way and self._under_way[0].exists():
            path, begun, stall = self._under_way
            self._under_way = None
            if self._control.is_driver:  # who decides when the run saves; it may look long after the end
                seconds = min(time.monotonic() - begun, stall + _seconds_of_writing(path))
                self._shutdown.expect("save", seconds)

    def exists(self, completed: int) -> bool:
        """Whether there is one after so many iterations; the driver's answer, on every rank."""
        return self._control.from_driver(self.path(completed).exists())


def _seconds_of_writing(checkpoint: Path) -> float:
    """Between what the driver wrote first and the last rank's tensors, by the file system's own clock."""
    first = (checkpoint / f"run_{RUN_FILES[0]}").stat().st_mtime
    return max([0.0, *(file.stat().st_mtime - first for file in checkpoint.glob("*.distcp"))])
