"""The folders of a run's checkpoints: which are complete, which are damaged, and what becomes of those."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_pmd.errors import CheckpointLost, DamagedCheckpoint
from megatron_pmd.files import iterations_in

STATE_FILE = "run_state.json"
FILES = "files"
"""In the run state: the size in bytes of every file that was written, by its path in the folder."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoint folder, the oldest first.

    One that is still being written has the suffix .partial, one that was set aside .damaged.
    """
    return [path for path in iterations_in(folder).values() if (path / STATE_FILE).is_file()]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoint folder."""
    found = complete(folder)
    return found[-1] if found else None


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """What the driver kept beside the tensors: prompt order, and the iterations done: the weight version.

    Raises DamagedCheckpoint.
    """
    return {name: value for name, value in _read(checkpoint).items() if name != FILES}


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint / STATE_FILE}: {error}") from None


def sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file in the folder, by its path there."""
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }


def check(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint for a file that is not there, or has not the size it was written with."""
    there = sizes(checkpoint)
    for name, size in _read(checkpoint).get(FILES, {}).items():
        if name not in there:
            raise DamagedCheckpoint(f"{checkpoint / name} is missing")
        if there[name] != size:
            raise DamagedCheckpoint(f"{checkpoint / name} has {there[name]:,} bytes of {size:,}")


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all there; newer ones are set aside, and that is said.

    None: there is no checkpoint. Raises CheckpointLost when all there are, are damaged.
    """
    while (newest := latest(folder)) is not None:
        try:
            with setting_aside(newest):
                check(newest)
                return newest
        except DamagedCheckpoint as damaged:
            say(str(damaged))
    return None


@contextmanager
def setting_aside(checkpoint: Path) -> Iterator[None]:
    """Where the block finds this checkpoint damaged, rename it, so that the one before is the newest.

    Raises DamagedCheckpoint, which tells both names; CheckpointLost when there is none before, and renames
    nothing then.
    """
    try:
        yield
    except DamagedCheckpoint as damaged:
        found = complete(checkpoint.parent)
        earlier = found[: found.index(checkpoint)] if checkpoint in found else found
        if not earlier:
            raise CheckpointLost(
                f"the run's only checkpoint is damaged: {damaged}; bring it back from a copy, or remove it: "
                "the run then begins anew"
            ) from damaged
        aside = checkpoint.with_suffix(".damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = checkpoint.with_suffix(f".damaged-{number}")
        with suppress(FileNotFoundError):  # another rank has found the same
            checkpoint.rename(aside)
        raise DamagedCheckpoint(
            f"DAMAGED CHECKPOINT: {damaged}; it is kept as {aside}, and the run goes on from {earlier[-1]}"
        ) from damaged
