"""Complete groups on disk as they come: another process goes on with them where the one before it ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.rollout.carried_over_file import read_groups, write_groups
from megatron_pmd.rollout.groups import Group

FOLDER = "sampled_ahead"
"""In the run folder."""


class GroupJournal:
    """One file a group, whole or absent, written in a thread beside sampling; for one process at a time."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="group-journal")
        self._begun: list[Future[None]] = []

    @staticmethod
    def discard(run_folder: Path) -> None:
        """Forget all: for a start that cannot go on with it."""
        shutil.rmtree(run_folder / FOLDER, ignore_errors=True)

    def read(self, problem: Callable[[Key], Problem], usable: Callable[[Group], bool]) -> dict[str, Group]:
        """The usable groups that are there, by Group.key; all else is removed.

        problem: the training problem of a key. CheckpointError for a file that cannot be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Group] = {}
        for path in self._folder.iterdir():
            (group,) = read_groups(path, problem) if path.suffix == ".parquet" else (None,)
            if group is not None and usable(group):
                found[group.key] = group
            else:
                path.unlink()
        return found

    def add(self, group: Group) -> None:
        """Begin to write a complete group, which nobody changes any more. Raises what went wrong before."""
        self._begin(lambda: write_groups(self._folder / f"{group.key}.parquet", [group]))

    def forget_before(self, iteration: int) -> None:
        """Begin to remove the groups of earlier iterations: they are trained on."""
        self._begin(lambda: self._remove_before(iteration))

    def wait(self) -> None:
        """Return when all is written. Raises what went wrong."""
        begun, self._begun = self._begun, []
        for each in begun:
            each.result()

    def _begin(self, work: Callable[[], None]) -> None:
        under_way = [each for each in self._begun if not each.done()]
        ended, self._begun = [each for each in self._begun if each.done()], under_way
        for each in ended:
            each.result()
        self._begun.append(self._thread.submit(work))

    def _remove_before(self, iteration: int) -> None:
        for path in self._folder.glob("*.parquet"):
            if int(path.name.partition("-")[0]) < iteration:
                path.unlink()
