"""Checkpoints: resuming changes nothing, and a checkpoint that is not whole is never resumed from."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.actor.conftest import LAYOUTS
from tests.actor.launch import launch
from tests.actor.reference import compute
from tests.actor.tiny_models import FAMILIES, WEIGHT_TOLERANCE, write_model


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_gives_the_next_step_bit_for_bit(one_process, family):
    (step, weights), (resumed_step, resumed_weights) = (
        one_process[family]["third"],
        one_process[family]["third_resumed"],
    )
    assert step == resumed_step
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_resuming_in_bf16_gives_the_next_step_bit_for_bit(models, tmp_path):
    (step, weights), (resumed_step, resumed_weights) = launch(
        "bf16_resume", path=models / "qwen3", folder=tmp_path
    )[0]
    assert next(iter(weights.values())).dtype == torch.bfloat16
    assert step == resumed_step
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def faults(models, tmp_path_factory):
    return launch("checkpoint_faults", path=models / "qwen3", folder=tmp_path_factory.mktemp("checkpoints"))[
        0
    ]


def test_a_full_disk_keeps_the_previous_checkpoint_and_names_it(faults):
    kind, message = faults["disk full"]
    assert kind == "CheckpointError"
    assert "iteration-2.partial" in message and "No space left on device" in message
    assert f"{faults['complete']} is complete and will be resumed from" in message
    assert faults["partial left"] == ["iteration-2.partial"]
    assert faults["latest after disk full"] == faults["complete"]
    assert faults["complete loads"] == ("", "")


def test_a_write_that_the_system_refuses_is_reported_in_one_line(faults):
    """A limit on a file's size stands for the disk's; torch hides the system's reason ("unexpected pos")."""
    kind, message = faults["write refused"]
    assert kind == "CheckpointError"
    assert "iteration-2.partial" in message and "is the disk full?" in message
    assert f"{faults['complete']} is complete and will be resumed from" in message
    assert "\n" not in message


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_no_other(faults):
    kind, message = faults["disk full, first"]
    assert kind == "CheckpointError" and "there is no earlier checkpoint" in message


def test_a_partial_folder_is_never_resumed_from(faults):
    assert faults["latest beside partial"] == faults["complete"]


def test_only_the_newest_are_kept_by_number_not_by_name(faults):
    assert faults["kept"] == ["iteration-10", "iteration-3", "none"]
    assert faults["latest of kept"].name == "iteration-10"
    assert faults["run state"] == {"iteration": 10}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("truncated", "iteration-10"),
        ("missing", "iteration-77"),
        ("broken run state", "iteration-10/run_state.json"),
        ("flipped bit", "iteration-3"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(faults, fault, named):
    kind, message = faults[fault]
    assert kind == "CheckpointError"
    assert named in message


def assert_takes_the_third_step(ranks, third, note: str) -> None:
    """`ranks` holds each rank's (loss sum, count, gradient norm) and weights after loading others' state."""
    assert sum(step[0] for step, _ in ranks) / sum(step[1] for step, _ in ranks) == pytest.approx(
        third.loss, rel=1e-5
    ), note
    assert ranks[0][0][2] == pytest.approx(third.gradient_norm, rel=1e-5), note
    weights = ranks[0][1]
    difference = {name: float((w.double() - third.weights[name]).abs().max()) for name, w in weights.items()}
    assert max(difference.values()) < WEIGHT_TOLERANCE, (note, difference)


@pytest.mark.serial
def test_every_layouts_checkpoint_resumes_in_one_process(trained, models, reference):
    """The third step needs the weights and the moments that other processes wrote: both must have arrived."""
    pairs = [(models / LAYOUTS[name][0], trained(name)[0]["checkpoint"]) for name in LAYOUTS]
    resumed = launch("resume", pairs=pairs)[0]
    for name, (step, weights) in zip(LAYOUTS, resumed, strict=True):
        uninterrupted = sum(rank["third"][0][0] for rank in trained(name))
        assert step[0] == pytest.approx(uninterrupted, abs=1e-6), name
        assert_takes_the_third_step([(step, weights)], reference(LAYOUTS[name][0]).steps[2], name)


@pytest.mark.serial
def test_a_checkpoint_of_one_process_resumes_under_expert_parallelism(one_process, models, reference):
    """Experts then have an optimizer of their own, with moments and a step count that one optimizer saved."""
    pairs = [(models / "qwen3moe", one_process["qwen3moe"]["checkpoint"])]
    ranks = launch("resume", ranks=2, pairs=pairs, layout=dict(expert=2, data=2))
    assert_takes_the_third_step([rank[0] for rank in ranks], reference("qwen3moe").steps[2], "expert=2")


@pytest.mark.serial
def test_tied_embeddings_lost_over_a_pipeline_are_refused_not_resumed_wrongly(tmp_path):
    """megatron-core 0.16.1 restores wrong rows of a tied vocabulary of 509 saved from two pipeline stages.

    When this test fails because loading succeeds, the defect is gone and the digest stays as a safeguard.
    """
    write_model(tmp_path / "model", "qwen2", vocab_size=509)
    torch.save(compute(tmp_path / "model"), tmp_path / "model" / "reference.pt")
    outcomes = launch(
        "save_and_load", ranks=2, path=tmp_path / "model", layout={"pipeline": 2}, folder=tmp_path / "saved"
    )
    refused = [message for kind, message in outcomes if kind == "CheckpointError"]
    assert refused and all("does not hold the weights it saved" in message for message in refused)
    shutil.rmtree(tmp_path / "saved")
