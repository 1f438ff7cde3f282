"""A real engine that dies, hangs, or is sent what it should not take: it ends with the right weights.

One process, one sequence of faults (fault_programs.py): every replacement of an engine costs a start of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.actor.launch import launch
from tests.actor.tiny_models import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

HEALTH_SECONDS, SYNC_SECONDS = 8.0, 12.0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model", "qwen3moe")
    return launch(
        "faults", module="tests.weight_sync.fault_programs", path=folder / "model", folder=folder / "run",
        health_seconds=HEALTH_SECONDS, sync_seconds=SYNC_SECONDS,
    )[0]  # fmt: skip


FAULTS = (
    "none", "router killed", "after a corrupted bucket", "after a dropped tensor", "stopped while generating",
    "stopped before release", "killed during sync", "stopped during sync",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_engine_serves_the_actors_weights_after(outcome, fault):
    """Every sync is verified in full: an engine that had any other parameter would have been refused."""
    assert outcome[fault]["status"] == 200
    assert outcome[fault]["version"] == outcome[fault]["expected"]


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.startswith(("none", "after", "killed", "stopped d", "stopped b"))]
)
def test_a_lost_engine_is_started_again_once_and_a_living_one_is_not(outcome, fault):
    assert outcome[fault]["starts"] == outcome[fault]["expected_starts"]


def test_a_corrupted_bucket_is_refused_with_the_names_of_engine_bucket_and_tensor(outcome):
    message = outcome["bucket corrupted"]
    assert message.startswith("EngineError: engine 0 (127.0.0.1, port ")
    assert "weight bucket" in message and "tensor model." in message and "checksum" in message


def test_a_dropped_tensor_fails_by_name(outcome):
    assert "engine 0" in outcome["tensor dropped"] and "did not come" in outcome["tensor dropped"]


def test_a_stuck_engine_is_killed_within_its_deadline(outcome):
    seen = outcome["stopped while generating"]
    assert not seen["alive"] and seen["lost"]
    # an interval of 1 s, a connection's share of the deadline, and a busy machine
    assert seen["seconds"] < 2 * HEALTH_SECONDS + 10


def test_an_engine_started_in_a_rollout_gets_weights_that_have_come_back_to_the_device(outcome):
    """There the actors' parameters have left it for the engines' caches."""
    assert outcome["stopped while generating"]["events"] == [
        "start", "wake_parameters", "push", "release_parameters"
    ]  # fmt: skip


def test_an_engine_started_in_a_sync_starts_without_the_actors_parameters_beside_it(outcome):
    assert outcome["killed during sync"]["events"] == [
        "push", "release_parameters", "start", "wake_parameters", "push"
    ]  # fmt: skip


def test_a_killed_router_is_noticed(outcome):
    assert outcome["router killed"]["noticed"]


def test_an_engine_stuck_in_a_sync_costs_no_more_than_the_deadlines_and_a_start(outcome):
    assert outcome["stopped during sync"]["seconds"] < SYNC_SECONDS + HEALTH_SECONDS + 90


def test_no_process_and_no_file_is_left(outcome):
    assert outcome["processes left"] == [] and outcome["files left"] == []
