"""Checkpoints: resuming changes nothing, and a checkpoint that is not whole is never resumed from."""

from __future__ import annotations

import functools
import json
import shutil
import time
from typing import Any

import psutil
import pytest
import torch

from megatron_pmd.actor import digests
from tests.actor.conftest import LAYOUTS
from tests.actor.launch import launch
from tests.actor.reference import compute
from tests.actor.tiny_models import FAMILIES, WEIGHT_TOLERANCE, write_model

on_ranks = functools.partial(launch, module="tests.actor.checkpoint_programs")


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_gives_the_next_step_bit_for_bit(one_process, family):
    (step, weights), (resumed_step, resumed_weights) = (
        one_process[family]["third"],
        one_process[family]["third_resumed"],
    )
    assert step == resumed_step
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_resuming_in_bf16_gives_the_next_step_bit_for_bit(models, tmp_path):
    (step, weights), (resumed_step, resumed_weights) = on_ranks(
        "bf16_resume", path=models / "qwen3", folder=tmp_path
    )[0]
    assert next(iter(weights.values())).dtype == torch.bfloat16
    assert step == resumed_step
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_the_digest_of_a_quantised_parameter_is_of_the_numbers_that_it_stands_for(monkeypatch):
    """As Transformer Engine's blockwise tensor it has bytes that cannot be viewed as integers."""

    class Blockwise(torch.nn.Parameter):
        numbers: torch.Tensor

        def view(self, *_: Any) -> Any:
            raise NotImplementedError("a tensor in blocks has no view of another type")

        def dequantize(self, *_: Any, **__: Any) -> Any:
            return self.numbers

    monkeypatch.setattr(digests, "is_float8tensor", lambda tensor: hasattr(tensor, "numbers"))
    monkeypatch.setattr(Blockwise, "detach", lambda self: self)
    plain, quantized = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), torch.nn.Module()
    quantized.weight = weight = Blockwise(torch.zeros(16, dtype=torch.uint8), requires_grad=False)
    weight.numbers = plain.weight.detach().clone()
    before = digests.digest([quantized])
    assert before == digests.digest([plain])
    weight.numbers[0, 0] += 1
    assert digests.digest([quantized]) != before


@pytest.fixture(scope="module")
def faults(models, tmp_path_factory):
    return on_ranks(
        "checkpoint_faults", path=models / "qwen3", folder=tmp_path_factory.mktemp("checkpoints")
    )[0]


def test_a_full_disk_keeps_the_previous_checkpoint_and_names_it(faults):
    kind, message = faults["disk full"]
    assert kind == "CheckpointError"
    assert "iteration-2.partial" in message and "No space left on device" in message
    assert f"{faults['complete']} is complete and will be resumed from" in message
    assert faults["partial left"] == ["iteration-2.partial"]
    assert faults["latest after disk full"] == faults["complete"]
    assert faults["complete loads"] == ("", "")


def test_a_write_that_the_system_refuses_is_reported_in_one_line_when_it_is_waited_for(faults):
    """A limit on a file's size stands for the disk's; torch hides the system's reason ("unexpected pos")."""
    assert faults["write begun"] == ("", "")
    kind, message = faults["write refused"]
    assert kind == "CheckpointError"
    assert "iteration-2.partial" in message and "is the disk full?" in message
    assert f"{faults['complete']} is complete and will be resumed from" in message
    assert "\n" not in message


def test_the_server_of_the_writers_queue_does_not_import_torch(faults):
    assert faults["servers of queues"] == [False], "one process, and it holds bytes"


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("writer", "`megatron-pmd checkpoint writer` of rank 0 ended before it was done: was it killed?"),
        ("results", "`megatron-pmd checkpoint results` of rank 0 has ended: was it killed?"),
    ],
)
def test_a_helper_that_was_killed_is_named_and_not_the_disk(faults, who, words):
    kind, message = faults[f"{who} killed"]
    assert kind == "CheckpointError" and words in message
    assert "iteration-11.partial: could not be written: the process" in message
    assert "is the disk full?" not in message and "will be resumed from" in message


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_no_other(faults):
    kind, message = faults["disk full, first"]
    assert kind == "CheckpointError" and "there is no earlier checkpoint" in message


def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint_and_no_writer(models, tmp_path):
    folder, pids = tmp_path / "checkpoints", tmp_path / "pids"
    with pytest.raises(AssertionError, match="ended with -9"):
        on_ranks("killed_while_saving", path=models / "qwen3", folder=folder, pids=pids)
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-1", "iteration-2.partial"]
    writers = {int(pid): started for pid, started in json.loads(pids.read_text()).items()}
    assert len(writers) >= 3, "the manager, the writer and a process for each file"
    deadline = time.monotonic() + 10
    while alive := [pid for pid, started in writers.items() if _runs(pid, started)]:
        assert time.monotonic() < deadline, f"processes {alive} outlived their rank"
        time.sleep(0.1)


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    # a folder that is not there is no damage: the path is wrong
    assert kind == ("CheckpointError" if fault == "missing" else "DamagedCheckpoint")
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


@pytest.mark.slow
def test_every_layouts_checkpoint_resumes_in_one_process(trained, models, reference):
    """The third step needs the weights and the moments that other processes wrote: both must have arrived."""
    one: dict[str, int] = {}
    cases = [(models / LAYOUTS[name][0], trained(name)[0]["checkpoint"], one) for name in LAYOUTS]
    resumed = launch("resume", cases=cases)[0]
    for name, (step, weights) in zip(LAYOUTS, resumed, strict=True):
        uninterrupted = sum(rank["third"][0][0] for rank in trained(name))
        assert step[0] == pytest.approx(uninterrupted, rel=1e-5), name
        assert_takes_the_third_step([(step, weights)], reference(LAYOUTS[name][0]).steps[2], name)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_resumes_under_expert_parallelism(one_process, models, reference):
    """Experts then have an optimizer of their own, with moments and a step count that one optimizer saved."""
    cases = [(models / "qwen3moe", one_process["qwen3moe"]["checkpoint"], dict(expert=2, data=2))]
    ranks = launch("resume", ranks=2, cases=cases)
    assert_takes_the_third_step([rank[0] for rank in ranks], reference("qwen3moe").steps[2], "expert=2")


OTHER_LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "dense, tensor=2": dict(pipeline=2),
        "dense, context=2": dict(tensor=2),
        "dense, pipeline=2, virtual_pipeline=2": dict(pipeline=2),
        "moe, expert=2, data=2": dict(tensor=2),
        "moe, tensor=2, expert=2, data=2": dict(expert=2, data=2),
        "moe, pipeline=2, expert=2, data=2": dict(tensor=2, expert=2),
        "latent, tensor=2, expert=2": dict(pipeline=2),
    },
    4: {
        "dense, data=2": dict(tensor=2, pipeline=2),
        "moe, tensor=2": dict(tensor=2, expert=2, data=2),
    },
}
"""Ranks to load with: layout that saved -> layout that loads."""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", OTHER_LAYOUTS)
def test_a_checkpoint_resumes_under_another_layout_of_as_many_fewer_or_more_ranks(
    trained, models, reference, ranks
):
    cases = [
        (models / LAYOUTS[name][0], trained(name)[0]["checkpoint"], layout)
        for name, layout in OTHER_LAYOUTS[ranks].items()
    ]
    results = launch("resume", ranks=ranks, cases=cases)
    for i, name in enumerate(OTHER_LAYOUTS[ranks]):
        third = reference(LAYOUTS[name][0]).steps[2]
        assert_takes_the_third_step([rank[i] for rank in results], third, name)


@pytest.mark.slow
def test_tied_embeddings_lost_over_a_pipeline_are_refused_not_resumed_wrongly(tmp_path):
    """megatron-core 0.19.2 restores wrong rows of a tied vocabulary of 509 saved from two pipeline stages.

    When this test fails because loading succeeds, the defect is gone and the digest stays as a safeguard.
    """
    write_model(tmp_path / "model", "qwen2", vocab_size=509)
    torch.save(compute(tmp_path / "model"), tmp_path / "model" / "reference.pt")
    outcomes = on_ranks(
        "save_and_load", ranks=2, path=tmp_path / "model", layout={"pipeline": 2}, folder=tmp_path / "saved"
    )
    refused = [message for kind, message in outcomes if kind == "DamagedCheckpoint"]
    assert refused and all("does not hold the weights it saved" in message for message in refused)
    shutil.rmtree(tmp_path / "saved")
