"""Two real engines and their router, one of which is killed at a time, with requests in flight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.actor.launch import launch
from tests.actor.tiny_models import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

FAMILY = "qwen3"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two-engines")
    write_model(folder / "model", FAMILY, max_position_embeddings=512)
    return launch(
        "two_engines", ranks=2, module="tests.weight_sync.two_engine_programs", path=folder / "model",
        folder=folder / "run",
    )  # fmt: skip


ROLLOUTS = {"engine killed": (1, [1, 1]), "router killed": (3, [1, 2]), "server killed": (4, [1, 2])}
"""By what is killed: the weights' version, and how often each engine has been started by the end."""


@pytest.mark.parametrize("killed", ROLLOUTS)
def test_the_kill_is_in_the_middle_of_the_work_of_both_engines(ranks, killed):
    seen = ranks[0][killed]
    assert all(count > 0 for count in seen["in flight"])
    assert 4 <= seen["finished before"] < 16


@pytest.mark.parametrize("killed", ROLLOUTS)
def test_every_response_is_completed_exactly_once(ranks, killed):
    seen = ranks[0][killed]
    assert seen["numbers"] == list(itertools.product(range(4), range(4)))
    assert seen["lengths"] == seen["budgets"] == [40] * 4 + [300] * 12
    assert seen["started"] == 16
    assert seen["sampled tokens"] == 4 * 40 + 12 * 300


@pytest.mark.parametrize("killed", ROLLOUTS)
def test_every_token_is_of_the_weights_that_it_says(ranks, killed):
    version, _ = ROLLOUTS[killed]
    assert ranks[0][killed]["versions"] == {version} == {rank[killed]["version"] for rank in ranks}
    assert max(rank[killed]["difference"] for rank in ranks) < 1e-3  # of log-probabilities, in fp32


@pytest.mark.parametrize("killed", ROLLOUTS)
def test_the_rollout_waits_for_no_deadline_and_no_start_of_an_engine(ranks, killed):
    assert [rank[killed]["starts"] for rank in ranks] == ROLLOUTS[killed][1]
    assert ranks[0][killed]["seconds"] < 60  # a request's deadline is 600 s


@pytest.mark.parametrize(
    "sync, version",
    [("sync after a killed engine", 2), ("broadcast", 3), ("router killed during sync", 4)],
)
def test_after_the_next_sync_the_router_and_both_engines_serve_the_new_weights(ranks, sync, version):
    """Each load by ipc is verified in full. That both get requests shows in the next rollout."""
    assert ranks[0][sync]["answers"] == [{"status": 200, "version": str(version)}] * 4
    assert [rank[sync]["versions"] for rank in ranks] == [[version, version]] * 2
    assert [rank[sync]["starts"] for rank in ranks] == [1, 2]


def test_both_engines_take_the_same_bits_from_one_broadcast(ranks):
    """By SGLang's own checksums. That they are the actor's shows in the next rollout: it has this version."""
    before, after = ranks[0]["broadcast"]["before"], ranks[0]["broadcast"]["after"]
    assert after[0] == after[1] and len(after[0]) > 10
    assert [name for name in after[0] if after[0][name] == before[0][name]] == []


def test_a_killed_router_is_started_again(ranks):
    routers = [
        ranks[0][name]["router"]
        for name in ("sync after a killed engine", "router killed", "router killed during sync")
    ]
    assert len(set(routers)) == 3


def test_no_process_is_left(ranks):
    assert [rank["processes left"] for rank in ranks] == [[], []]
