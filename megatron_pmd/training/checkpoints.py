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


class Checkpoints:
    """Collective, as the actor's own methods are."""

    def __init__(self, folder: Path, control: Control, actor: Actor, shutdown: Shutdown) -> None:
        """folder: of the run."""
        self._folder, self._control, self._actor, self._shutdown = folder, control, actor, shutdown
        self._under_way: tuple[Path, float] | None = None

    def path(self, completed: int) -> Path:
        """Of the checkpoint after so many iterations."""
        return self._folder / "checkpoints" / f"iteration-{completed}"

    def begin(self, state: RunState) -> None:
        """Begin a checkpoint of the run as it stands; it appears when it is complete."""
        completed, carried_over = state.completed, [*state.carried_over, *state.ahead]
        self._under_way = (self.path(completed), time.monotonic())
        run_state = self._control.from_driver({"iteration": completed, **state.prompts})
        self._actor.save(
            self._folder / "checkpoints", completed, run_state,
            lambda checkpoint: self._write_more(checkpoint, carried_over),
        )  # fmt: skip

    def _write_more(self, checkpoint: Path, carried_over: list[Group]) -> None:
        write_carried_over(checkpoint, carried_over)
        for name in ("config.json", "versions.json"):  # a copy of the checkpoint alone then says what it is
            shutil.copyfile(self._folder / name, checkpoint / f"run_{name}")

    def publish(self, *, wait: bool) -> None:
        """Publish a complete checkpoint; its time counts whole although it is written beside other phases."""
        self._actor.publish_checkpoint(wait=wait)
        if self._under_way and self._under_way[0].exists():
            self._shutdown.expect("save", time.monotonic() - self._under_way[1])
            self._under_way = None

    def exists(self, completed: int) -> bool:
        """Whether there is one after so many iterations; the driver's answer, on every rank."""
        return self._control.from_driver(self.path(completed).exists())
