"""A run's checkpoints: what goes into one, when it is complete, and how long that took."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from megatron_pmd.actor.actor import Actor
from megatron_pmd.distributed import Control
from megatron_pmd.rollout.carried_over import write_kept
from megatron_pmd.rollout.groups import Group
from megatron_pmd.training.shutdown import Ending


class Saving:
    """Collective, as the actor's own methods are."""

    def __init__(self, folder: Path, control: Control, actor: Actor, ending: Ending) -> None:
        """folder: of the run."""
        self._folder, self._control, self._actor, self._ending = folder, control, actor, ending
        self._problems: dict[str, Any] = {}
        self._kept: list[Group] = []
        self._under_way: tuple[Path, float] | None = None

    def note(self, problems: dict[str, Any], kept: list[Group]) -> None:
        """What the next checkpoint has beside the actor: where the prompts stand, responses to go on with.

        While an iteration is under way that is its beginning, with the responses it has so far. The driver's
        values count.
        """
        self._problems, self._kept = problems, kept

    def path(self, completed: int) -> Path:
        """Of the checkpoint after so many iterations."""
        return self._folder / "checkpoints" / f"iteration-{completed}"

    def begin(self, completed: int) -> None:
        """Begin a checkpoint after `completed` iterations: the number is the weight version's too."""
        state = self._control.from_driver({"iteration": completed, **self._problems})
        self._under_way = (self.path(completed), time.monotonic())
        self._actor.save(self._folder / "checkpoints", completed, state, self._write_more)

    def _write_more(self, checkpoint: Path) -> None:
        write_kept(checkpoint, self._kept)
        for name in ("config.json", "versions.json"):  # a copy of the checkpoint alone then says what it is
            shutil.copyfile(self._folder / name, checkpoint / f"run_{name}")

    def publish(self, *, wait: bool) -> None:
        """Publish a complete checkpoint; its time counts whole although it is written beside other phases."""
        self._actor.publish_checkpoint(wait=wait)
        if self._under_way and self._under_way[0].exists():
            self._ending.expect("save", time.monotonic() - self._under_way[1])
            self._under_way = None
