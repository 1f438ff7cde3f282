"""Which exports of the policy a run still owes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pmd.config import override
from megatron_pmd.training import exports
from recipes import recipe

LORA = 'actor.lora={"rank": 2, "alpha": 4}'


def resumed_after(folder: Path, completed: int, *settings: str, resumed: bool = True) -> Any:
    """A run of four iterations that exports after each second one."""
    config = override(recipe("tiny_moe_cpu"), ["iterations=4", "checkpoint.hf_export_every=2", *settings])
    return SimpleNamespace(
        config=config, folder=folder, control=SimpleNamespace(from_driver=lambda value: value),
        state=SimpleNamespace(completed=completed, resumed=resumed),
    )  # fmt: skip


def test_an_export_that_a_start_did_not_come_to_is_missing_until_its_folder_is_there(tmp_path):
    assert exports.is_missing(resumed_after(tmp_path, 2))
    (tmp_path / "hf" / "iteration-2.partial").mkdir(parents=True)
    assert exports.is_missing(resumed_after(tmp_path, 2)), "one that a kill cut off"
    (tmp_path / "hf" / "iteration-2").mkdir()
    assert not exports.is_missing(resumed_after(tmp_path, 2))


def test_with_adapters_their_folder_has_to_be_there_too(tmp_path):
    (tmp_path / "hf" / "iteration-2").mkdir(parents=True)
    assert exports.is_missing(resumed_after(tmp_path, 2, LORA))
    (tmp_path / "adapters" / "iteration-2").mkdir(parents=True)
    assert not exports.is_missing(resumed_after(tmp_path, 2, LORA))


@pytest.mark.parametrize(
    ("completed", "settings", "resumed"),
    [(3, [], True), (4, [], True), (2, ["checkpoint.hf_export_every=null"], True), (0, [], False)],
)
def test_none_is_missing_where_none_was_due(tmp_path, completed, settings, resumed):
    assert not exports.is_missing(resumed_after(tmp_path, completed, *settings, resumed=resumed))
