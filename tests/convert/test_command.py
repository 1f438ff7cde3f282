"""The command line: a run's checkpoint by iteration, and comparing two of anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_pmd.cli.convert import locate
from megatron_pmd.errors import CheckpointError, ConfigError
from tests.actor.launch import REPOSITORY
from tests.actor.test_bad_models import edit_weights
from tests.actor.tiny_models import config_for
from tests.convert.command_line import convert

pytestmark = pytest.mark.slow


@pytest.fixture
def run(variants, converted, tmp_path) -> Path:
    """A run's folder with checkpoints of iterations 2 and 40, of different weights, and a partial one."""
    folder = tmp_path / "runs/test"
    for iteration, model in (("2", "qwen3, no grouping"), ("40", "qwen3"), ("60.partial", "qwen3")):
        shutil.copytree(converted[0] / model / "megatron", folder / f"checkpoints/iteration-{iteration}")
    config = config_for(variants / "qwen3").model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_runs_checkpoint_becomes_a_model_folder(run, variants, tmp_path):
    done = convert("megatron-to-hf", run, "--iteration", 40, "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "46 tensors, each once" in done.stdout
    before, after = (load_file(f / "model.safetensors") for f in (variants / "qwen3", tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_an_iteration_the_newest_complete_checkpoint_is_meant(run, variants):
    assert locate(run, None, None) == (run / "checkpoints/iteration-40", variants / "qwen3")
    assert locate(run, 2, variants / "llama") == (run / "checkpoints/iteration-2", variants / "llama")


def test_an_iteration_that_was_not_kept_is_an_error_that_names_those_that_were(run):
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 7; there are 2, 40"):
        locate(run, 7, None)


def test_a_checkpoint_without_a_model_folder_asks_for_one(run):
    shutil.rmtree(run / "checkpoints/iteration-2/hf")
    with pytest.raises(ConfigError, match="--model must name"):
        locate(run / "checkpoints/iteration-2", None, None)
    with pytest.raises(ConfigError, match="--iteration has no meaning"):
        locate(run / "checkpoints/iteration-2", 3, None)


def test_diff_names_the_tensors_that_differ_and_by_how_much(variants, converted, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(variants / "qwen3", changed)
    name = "model.layers.2.mlp.up_proj.weight"
    edit_weights(lambda t: t[name][0].add_(0.5))(changed)
    edit_weights(lambda t: t.pop("model.norm.weight"))(changed)
    done = convert("diff", converted[0] / "qwen3/megatron", changed)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "model.norm.weight: only in the first" in lines
    (difference,) = [line for line in lines if line.startswith(name)]
    # one of 128 rows
    assert "max |a − b| 0.5 " in difference and "0.8% of elements differ" in difference
    assert lines[-1] == "44 tensors are the same bit for bit, 2 are not"


def test_diff_of_a_model_and_its_checkpoint_finds_nothing(variants, converted):
    done = convert("diff", variants / "qwen3moe", converted[0] / "qwen3moe/megatron")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "87 tensors are the same bit for bit, 0 are not"


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_the_ranks_of_torchrun_share_a_conversion(variants, converted, tmp_path, direction):
    source = variants / "qwen3" if direction == "hf-to-megatron" else converted[0] / "qwen3/megatron"
    words = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megatron_pmd.cli",
        "convert",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *words, direction, source, "--out", tmp_path / "out"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "out" / "conversion.json").read_text())["tensors"]
    alone = converted[1]["qwen3"][0]["tensors"]
    assert {name: made[name]["sha256"] for name in made} == {name: alone[name]["sha256"] for name in alone}


def test_an_error_is_one_message(converted, tmp_path):
    done = convert("megatron-to-hf", converted[0] / "qwen3/megatron", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"refused: ConfigError: {tmp_path} exists")
    assert "Traceback" not in done.stderr
