"""Whole iterations by the command line: FP8, recorded experts, two ranks, checkpoints, and how runs end."""

from __future__ import annotations

import json
from math import isfinite

import pytest
from safetensors.torch import load_file

from tests.gpu_emulated.runs import Runs

pytestmark = pytest.mark.long

REPLAYED = ["actor.experts.replay_routing=true"]
CASES = {
    "dense, tensor=2, tensorwise": ("dense for fp8", dict(tensor=2), ["actor.fp8.recipe=tensorwise"]),
    "experts, expert=2, blockwise gathered": (
        "experts for fp8",
        dict(data=2, expert=2),
        ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true", *REPLAYED],
    ),
    "latent, pipeline=2, delayed": (
        "latent for fp8", dict(pipeline=2), ["actor.fp8.recipe=delayed", "optimizer.moments=bf16", *REPLAYED],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def runs(request, models, tmp_path_factory):
    model, layout, settings = CASES[request.param]
    made = Runs(tmp_path_factory.mktemp("runs"), models / model, layout, settings)
    done = made.train("whole")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return made


def test_two_iterations_train_and_write_a_folder_that_others_read(runs):
    steps = runs.lines("whole", "step")
    assert len(steps) == 2
    assert all(isfinite(step["loss"]) and step["gradient_norm"] > 0 for step in steps)
    folder = runs.folder / "runs" / "whole"
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"
    written = sorted((folder / "hf").glob("**/*.safetensors"))
    before = load_file(next(runs.model.glob("*.safetensors")))
    after = {name: tensor for file in written for name, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    assert any((after[name].float() != before[name].float()).any() for name in before)


def test_stopped_after_one_iteration_a_run_goes_on_to_the_same_steps(runs):
    first = runs.train("halves", "iterations=1")
    assert first.returncode == 0, (first.stdout + first.stderr)[-5000:]
    second = runs.train("halves")
    assert second.returncode == 0, (second.stdout + second.stderr)[-5000:]
    assert "resuming after 1 iteration" in second.stdout
    assert runs.lines("halves", "step") == runs.lines("whole", "step")
