"""Which checkpoint a run goes on from when files have been lost. No tensor is read here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_pmd.actor.checkpoint_folders import STATE_FILE, complete, newest_sound, setting_aside, sizes
from megatron_pmd.errors import CheckpointLost, DamagedCheckpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints 2, 9 and 10, and one that is being written."""
    for name in ("iteration-2", "iteration-9", "iteration-10", "iteration-11.partial"):
        checkpoint = tmp_path / name
        (checkpoint / "carried").mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_bytes(bytes(1000))
        (checkpoint / "carried" / "over").write_text(name)
        state = {"iteration": int(checkpoint.stem.split("-")[1]), "files": sizes(checkpoint)}
        (checkpoint / STATE_FILE).write_text(json.dumps(state))
    return tmp_path


def cut(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_bytes(bytes(999))


def lose(checkpoint: Path) -> None:
    (checkpoint / "carried" / "over").unlink()


def break_state(checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).write_bytes(bytes(100))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "__0_0.distcp has 999 bytes of 1,000"),
        (lose, "carried/over is missing"),
        (break_state, "Expecting"),
    ],
)
def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one_and_keeps_that(
    folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder / "iteration-10")
    said: list[str] = []
    assert newest_sound(folder, said.append) == folder / "iteration-9"
    assert len(said) == 1 and said[0].startswith("DAMAGED CHECKPOINT: ") and words in said[0]
    assert f"kept as {folder}/iteration-10.damaged, and the run goes on from {folder}/iteration-9" in said[0]
    assert (folder / "iteration-10.damaged" / "__0_0.distcp").exists()
    assert newest_sound(folder, said.append) == folder / "iteration-9" and len(said) == 1


def test_a_checkpoint_whose_files_are_all_there_is_resumed_from(folder: Path) -> None:
    assert newest_sound(folder, pytest.fail) == folder / "iteration-10"
    assert newest_sound(folder / "none", pytest.fail) is None
    (folder / "iteration-10" / STATE_FILE).write_text('{"iteration": 10}')
    lose(folder / "iteration-10")
    assert newest_sound(folder, pytest.fail) == folder / "iteration-10", "of a version that noted no sizes"


def test_the_only_checkpoint_is_not_set_aside_and_a_person_is_asked(folder: Path) -> None:
    for checkpoint in complete(folder):
        cut(checkpoint)
    with pytest.raises(
        CheckpointLost, match=r"only checkpoint is damaged: .*iteration-2/__0_0.distcp has"
    ) as lost:
        newest_sound(folder, lambda text: None)
    assert lost.value.refuses
    assert sorted(path.name for path in folder.iterdir()) == [
        "iteration-10.damaged", "iteration-11.partial", "iteration-2", "iteration-9.damaged"
    ]  # fmt: skip


def test_two_ranks_that_find_the_same_damage_set_it_aside_once(folder: Path) -> None:
    newest = folder / "iteration-10"
    (folder / "iteration-10.damaged").mkdir()  # of an earlier time that the run came to this iteration
    for _ in range(2):
        with pytest.raises(DamagedCheckpoint, match="iteration-9"), setting_aside(newest):
            raise DamagedCheckpoint(f"{newest}: rank 1 does not hold the weights it saved")
    assert (folder / "iteration-10.damaged-2" / STATE_FILE).exists()
    assert [path.name for path in complete(folder)] == ["iteration-2", "iteration-9"]


def test_a_users_copy_is_no_checkpoint_of_the_run(folder: Path) -> None:
    for name in ("iteration-10-keep", "iteration-best", "iteration-12.damaged"):
        shutil.copytree(folder / "iteration-10", folder / name)
    assert [path.name for path in complete(folder)] == ["iteration-2", "iteration-9", "iteration-10"]
