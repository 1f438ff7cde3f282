"""Four processes, one device each, talk through the emulated NCCL as torch's own process group drives it."""

from __future__ import annotations

import os

import pytest

from tests.emulated_cuda.tests.launched import launch

RANKS = 4


def test_every_collective_gives_each_rank_what_it_has_to() -> None:
    for rank, (code, output) in enumerate(launch("collectives", "all", ranks=RANKS)):
        assert code == 0 and f"rank {rank}: done" in output, output[-2000:]


def test_a_rank_that_waits_for_one_that_died_says_which() -> None:
    codes = launch("collectives", "dies", ranks=RANKS)
    assert codes[1][0] == 3
    for rank in (0, 2, 3):
        assert codes[rank][0] == 0, codes[rank][1][-2000:]
        assert f"ended while rank {rank} waited for it" in codes[rank][1]


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> None:
    """A message that nobody took would be given to a later communicator of the same name."""

    def look() -> None:
        if "died" not in request.node.name:
            left = [name for name in os.listdir(os.environ["EMULATED_CUDA_STATE"]) if name.startswith("nccl")]
            assert not left, left

    request.addfinalizer(look)
