"""Each rank gets the tokens that it trains on, through memory that nothing but its ranks keeps."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pmd.batch import RolloutBatch, Sample
from tests.actor.launch import launch
from tests.actor.tiny_models import rollout, with_routing, write_model
from tests.actor.warm import REPOSITORY
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


@pytest.fixture
def room(tmp_path) -> Path:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces: a shared memory of its own")
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def in_room(
    room: Path, size: str, program: str, *, ranks: int, **arguments: Any
) -> tuple[int, str, list[str]]:
    """Run a program with a tmpfs of this size mounted there: its exit code, its output, and the folder's
    blocks in use and its files after all ranks have ended."""
    order = room.parent / "order"
    order.write_bytes(pickle.dumps((program, arguments)))
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={ranks}"
    program = f"{sys.executable} {torchrun} -m tests.actor.launch {PROGRAMS} {order}"
    mount, after = f"mount -t tmpfs -o size={size} tmpfs {room}", f"stat -f -c '%b %f' {room}; ls -A {room}"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f"{mount} && {program}; code=$?; echo AFTER; {after}; exit $code"],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    output, _, rest = done.stdout.rpartition("AFTER\n")
    blocks, *files = rest.splitlines()
    total, free = map(int, blocks.split())
    return done.returncode, output, [*([f"{total - free} blocks"] if total != free else []), *files]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["driver killed", "rank killed", "exception", ""])
def test_shared_memory_is_empty_however_the_ranks_end(room, how):
    code, output, left = in_room(room, "8m", "interrupted", ranks=2, samples=samples(), memory=room, how=how)
    assert left == []
    if how:
        assert code != 0 and "in use: 0" not in output and "in use: " in output, output
    else:
        assert code == 0, output
        assert torch.load(room.parent / "0.pt") > 0


@pytest.mark.slow
def test_a_batch_for_which_shared_memory_is_too_small_is_in_a_temporary_file_and_the_driver_says_so(room):
    temporary = room.parent / "temporary"
    temporary.mkdir()
    code, output, left = in_room(
        room, "4k", "without_room", ranks=1, samples=samples(), memory=room, temporary=temporary
    )
    assert (code, left) == (0, []), output
    (said,), whole, error = torch.load(room.parent / "0.pt")
    assert f"{room} of node 0 has no room" in said and f"they are in {temporary}" in said
    assert whole and not error and not list(temporary.iterdir())


@pytest.mark.slow
def test_a_batch_for_which_there_is_room_nowhere_is_refused_with_what_to_do(room):
    code, output, left = in_room(
        room, "4k", "without_room", ranks=1, samples=samples(), memory=room, temporary=room
    )
    assert (code, left) == (0, []), output
    _, _, error = torch.load(room.parent / "0.pt")
    assert f"in {room} (No space left on device) or in {room}" in error and "let TMPDIR name" in error
