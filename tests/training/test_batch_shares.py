"""Each rank gets the tokens that it trains on, through memory that nothing but its ranks keeps."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_pmd.batch import RolloutBatch, Sample
from tests.actor.launch import launch, launch_from
from tests.actor.tiny_models import rollout, with_routing, write_model
from tests.actor.warm import WarmProcess
from tests.training.share_programs import ARRAYS, Case

PROGRAMS = "tests.training.share_programs"
EXAMPLES = 3
"""Fewer than four replicas: one has a micro-batch without any."""
CASES: dict[int, dict[str, Case]] = {
    1: {"DP1": ({}, 1)},
    2: {
        "DP2": (dict(data=2), 1),
        "DP2, a node each": (dict(data=2), 2),
        "CP2": (dict(context=2), 1),
        "CP2, a node each": (dict(context=2), 2),
    },
    4: {
        "DP4": (dict(data=4), 1),
        "DP4 on two nodes": (dict(data=4), 2),
        "TP2 PP2": (dict(tensor=2, pipeline=2), 1),
        "TP2 PP2, a node a stage": (dict(tensor=2, pipeline=2), 2),
        "TP2 DP2, a node a replica": (dict(tensor=2, data=2), 2),
    },
}


def samples() -> list[Sample]:
    rng = np.random.default_rng(7)
    drawn = with_routing(rollout())
    for sample in drawn:
        sample.engine_log_probs = -rng.random(len(sample.response_tokens), np.float32)
    return drawn


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in shared memory that only these tests use."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, memory) -> dict[str, list[dict[str, Any]]]:
    """Every rank's, by case."""
    model = tmp_path_factory.mktemp("model") / "qwen3moe"
    write_model(model, "qwen3moe")
    results: dict[str, list[dict[str, Any]]] = {}
    for ranks, cases in CASES.items():
        found = launch(
            "trained", ranks=ranks, module=PROGRAMS, path=model, cases=cases, samples=samples(),
            examples=EXAMPLES, memory=memory,
        )  # fmt: skip
        results |= {name: [rank[name] for rank in found] for name in cases}
    return results


NAMES = [name for cases in CASES.values() for name in cases]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_has_the_tokens_that_it_trains_on_and_no_others(outcomes, name):
    whole = RolloutBatch.pack(samples(), 0.8)
    bounds = list(zip(whole.tokens.offsets[:-1].tolist(), whole.tokens.offsets[1:].tolist(), strict=True))
    for rank in outcomes[name]:
        assert rank["here"].tolist() == rank["expected"].tolist()
        for array in ARRAYS:
            expected = np.concatenate([getattr(whole.tokens, array)[slice(*bounds[i])] for i in rank["here"]])
            assert rank["arrays"][array].dtype == expected.dtype
            assert np.array_equal(rank["arrays"][array], expected), array


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_of_all_replicas_have_the_whole_rollout_once(outcomes, name):
    replicas = {tuple(rank["here"].tolist()) for rank in outcomes[name]}
    data = next(cases[name][0].get("data", 1) for cases in CASES.values() if name in cases)
    assert len(replicas) == data
    assert sorted(number for replica in replicas for number in replica) == list(range(16))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_maps_its_own_section_alone_and_no_folder_lists_the_file(outcomes, name):
    for rank in outcomes[name]:
        own = sum(array.nbytes for array in rank["arrays"].values())
        assert 0 <= rank["mapped"] - own < mmap.PAGESIZE
        assert rank["listed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_and_step_are_those_of_a_rank_with_the_whole_batch_bit_for_bit(outcomes, name):
    for rank in outcomes[name]:
        with_whole, with_share = rank["reports"]
        torch.testing.assert_close(with_share, with_whole, rtol=0, atol=0, equal_nan=True)
    assert all(rank["reports"][1][4] > 0 for rank in outcomes[name]), "a gradient norm"


# memory of a size that the test chooses


class Rooms(NamedTuple):
    """Folders in a memory of their own each, and ranks that see it."""

    ranks: WarmProcess
    large: Path
    small: Path

    def launch(self, program: str, *, ranks: int = 1, **arguments: Any) -> list[Any]:
        return launch_from(self.ranks, "tests.actor.launch:run_order", PROGRAMS, program, arguments, ranks)

    def left(self, room: Path) -> list[str]:
        """The room's blocks in use, and its files."""
        return self.launch("left_in", memory=room)[0]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Iterator[Rooms]:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces: a shared memory of its own")
    large, small = (tmp_path_factory.mktemp(name) for name in ("large", "small"))
    mounts = [f"mount -t tmpfs -o size={size} tmpfs {room}" for size, room in (("8m", large), ("4k", small))]
    ranks = WarmProcess(
        PROGRAMS, within=["unshare", "-Urm", "sh", "-ec", "; ".join([*mounts, 'exec "$@"']), "sh"]
    )
    yield Rooms(ranks, large, small)
    ranks.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["driver killed", "rank killed", "exception", ""])
def test_shared_memory_is_empty_however_the_ranks_end(rooms, how):
    arguments: dict[str, Any] = dict(samples=samples(), memory=rooms.large, how=how)
    if how:
        with pytest.raises(AssertionError, match="in use: ") as ended:
            rooms.launch("interrupted", ranks=2, **arguments)
        assert "in use: 0" not in str(ended.value)
    else:
        assert rooms.launch("interrupted", ranks=2, **arguments)[0] > 0
    assert rooms.left(rooms.large) == []


@pytest.mark.slow
def test_a_batch_for_which_shared_memory_is_too_small_is_in_a_temporary_file_and_the_driver_says_so(
    rooms, tmp_path
):
    arguments: dict[str, Any] = dict(samples=samples(), memory=rooms.small, temporary=tmp_path)
    (said,), whole, error = rooms.launch("without_room", **arguments)[0]
    assert f"{rooms.small} of node 0 has no room" in said and f"they are in {tmp_path}" in said
    assert whole and not error and not list(tmp_path.iterdir())
    assert rooms.left(rooms.small) == []


@pytest.mark.slow
def test_a_batch_for_which_there_is_room_nowhere_is_refused_with_what_to_do(rooms):
    room = rooms.small
    _, _, error = rooms.launch("without_room", samples=samples(), memory=room, temporary=room)[0]
    assert f"in {room} (No space left on device) or in {room}" in error and "let TMPDIR name" in error
    assert rooms.left(room) == []
