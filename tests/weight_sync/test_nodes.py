"""One real engine whose tensor-parallel ranks are on two nodes: it starts, is given weights, is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.actor.launch import launch
from tests.actor.tiny_models import write_model
from tests.engine.live_engine import largest_difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

FAMILY = "qwen3moe"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("nodes") / "model"
    write_model(folder, FAMILY)
    return folder


@pytest.fixture(scope="module")
def outcomes(model) -> list[dict[str, Any]]:
    """Of the first and the second node."""
    return launch(
        "engine_over_two_nodes", ranks=2, module="tests.weight_sync.node_programs", path=model,
        folder=model.parent / "run",
    )  # fmt: skip


@pytest.mark.parametrize("answers", ["answers", "answers of another"])
def test_the_log_probs_are_those_of_transformers(model, outcomes, answers):
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert largest_difference(reference, outcomes[0][answers]) < 1e-4


def test_the_engine_serves_the_version_it_was_given_last(outcomes):
    versions = [
        {answer["meta_info"]["weight_version"] for answer in outcomes[0][answers]}
        for answers in ("answers", "answers of another")
    ]
    assert versions == [{"1"}, {"3"}]


def test_the_first_nodes_rank_leads_and_every_part_has_a_log(outcomes):
    assert [outcome["serves"] for outcome in outcomes] == [(0, 1), ()]
    assert [outcome["log"] for outcome in outcomes] == ["engine-0.log", "engine-0-node-1.log"]


def test_a_bucket_damaged_on_the_second_node_is_refused_by_that_nodes_rank(outcomes):
    for outcome in outcomes:
        assert "rank 1 refused the weights" in outcome["refused"] and "checksum" in outcome["refused"]


def test_no_process_is_left_on_either_node(outcomes):
    assert [outcome["processes left"] for outcome in outcomes] == [[], []]
