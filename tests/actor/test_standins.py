"""Each stand-in of megatron_pmd/actor/cpu is still needed: without it training fails or is wrong.

When one of these tests fails, the defect it answers is gone from the version installed: delete the stand-in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_pmd.actor.cpu.standins import STAND_INS
from tests.actor.launch import DEADLINE_SECONDS, REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without CUDA"),
]


@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory) -> dict[str, str]:
    """What goes wrong in each trial, "" if nothing: one process, a forked child a trial (2 to 5 s each)."""
    folder = tmp_path_factory.mktemp("stand-ins")
    output, log = folder / "outcomes.json", folder / "log"
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-m", "tests.actor.standin_trials", models, output],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_SECONDS,
        ).returncode
    assert code == 0, log.read_text()[-3000:]
    return json.loads(output.read_text())


def test_with_all_stand_ins_training_saving_and_loading_are_right(outcomes):
    complete = {name: outcome for name, outcome in outcomes.items() if name.startswith("nothing left out")}
    assert len(complete) == 6
    assert set(complete.values()) == {""}, complete


@pytest.mark.parametrize("name", STAND_INS)
def test_training_is_not_right_without_the_stand_in(outcomes, name):
    assert outcomes[name] != ""
    assert not outcomes[name].startswith(("not done", "LayoutError", "ImportError", "AttributeError")), (
        "this is a fault of the trial"
    )


def test_rotating_all_sequences_of_a_row_at_once_gives_megatrons_numbers_and_megatron_does_not(outcomes):
    assert outcomes["rotate_at_once"] == ""


def test_a_model_on_the_meta_device_takes_no_memory_under_the_stand_ins(models, tmp_path):
    # of a process that has made no tensor in a device context before
    program = """
import sys
from pathlib import Path
from megatron_pmd.convert.session import ranks
with ranks():
    import torch
    from megatron_pmd.actor.parameters import build_whole, open_bridge
    for name in ("qwen3", "qwen3moe", "deepseek"):
        folder = Path(sys.argv[1]) / name
        module = build_whole(open_bridge(folder), dtype=torch.float32, on_meta=True)
        assert {p.device.type for p in module.parameters()} == {"meta"}, name
"""
    done = subprocess.run(
        [sys.executable, "-c", program, models], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_megatron_bridge_still_imports_transformer_engine_unasked(outcomes):
    assert "ModuleNotFoundError: No module named 'transformer_engine'" in outcomes["transformer_engine"]


def test_megatron_core_must_look_for_transformer_engine_before_the_stand_in_appears(outcomes):
    assert outcomes["core modules first"] != ""
