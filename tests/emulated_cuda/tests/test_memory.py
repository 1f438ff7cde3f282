"""The device's memory: counted like a device's, seen by all processes, opened by handles."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.emulated_cuda.account import held_bytes, peak_bytes, reset_peak

MEGABYTE = 2**20
OPENS = """
import sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
import pickle
function, arguments = pickle.loads(bytes.fromhex(sys.stdin.readline()))
tensor = function(*arguments)
print(tensor.sum().item(), flush=True)
tensor[0] = 7.0
"""
HOLDS = """
import torch
kept = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
print("holds", flush=True)
input()
"""


def elsewhere(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def test_what_is_allocated_is_missing_until_the_allocator_gives_it_back() -> None:
    torch.cuda.empty_cache()
    before = free_bytes()
    kept = torch.empty(100 * MEGABYTE, dtype=torch.uint8, device="cuda")
    assert before - free_bytes() == 100 * MEGABYTE
    del kept
    assert before - free_bytes() == 100 * MEGABYTE  # it is the allocator's
    torch.cuda.empty_cache()
    assert free_bytes() == before


def test_an_allocation_beyond_the_device_fails_as_on_a_device() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"GPU 0 has a total capacity of 79\.18 GiB"):
        torch.empty(80 * 2**30, dtype=torch.uint8, device="cuda")
    assert torch.ones(3, device="cuda").sum() == 3  # and the device goes on


def test_the_runtime_keeps_the_peak() -> None:
    torch.cuda.empty_cache()
    reset_peak(0)
    held = held_bytes(0)
    kept = torch.empty(50 * MEGABYTE, dtype=torch.uint8, device="cuda")
    del kept
    torch.cuda.empty_cache()
    assert held_bytes(0) == held
    assert peak_bytes(0) == held + 50 * MEGABYTE


def test_a_process_holds_its_share_of_the_device_until_it_ends_or_is_killed() -> None:
    torch.cuda.empty_cache()
    before = free_bytes()
    other = elsewhere(HOLDS)
    assert other.stdout and other.stdout.readline() == "holds\n"
    assert before - free_bytes() == 64 * MEGABYTE
    other.kill()
    other.communicate()
    assert free_bytes() == before


def handle_of(tensor: torch.Tensor) -> str:
    import pickle

    from torch.multiprocessing.reductions import reduce_tensor

    return pickle.dumps(reduce_tensor(tensor)).hex() + "\n"


def test_another_process_opens_a_handle_to_the_same_memory() -> None:
    tensor = torch.arange(1000.0, device="cuda")
    output, errors = elsewhere(OPENS).communicate(handle_of(tensor), timeout=60)
    assert output == f"{1000 * 999 / 2}\n", errors
    assert tensor[0] == 7.0


def test_a_handle_of_a_process_that_ended_does_not_open() -> None:
    made = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-c",
            f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
            "import pickle; from torch.multiprocessing.reductions import reduce_tensor\n"
            "t = torch.ones(9, device='cuda'); print(pickle.dumps(reduce_tensor(t)).hex())",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    output, errors = elsewhere(OPENS).communicate(made.stdout, timeout=60)
    assert output == "" and "invalid resource handle" in errors
