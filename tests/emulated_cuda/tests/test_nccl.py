"""Four processes, one device each, talk through the emulated NCCL as torch's own process group drives it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

RANKS = 4


def launch(what: str) -> list[tuple[int, str]]:
    """Exit code and output of each rank of collectives.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["EMULATED_CUDA_DEVICES"] = str(RANKS)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"{__package__}.collectives", what],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


def test_every_collective_gives_each_rank_what_it_has_to() -> None:
    for rank, (code, output) in enumerate(launch("all")):
        assert code == 0 and f"rank {rank}: done" in output, output[-2000:]


def test_a_rank_that_waits_for_one_that_died_says_which() -> None:
    codes = launch("dies")
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
