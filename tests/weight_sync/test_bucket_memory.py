"""Where a weight bucket is in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync import bucket as bucket_module
from megatron_pmd.weight_sync.bucket import SharedBucket, sweep


def test_a_bucket_takes_no_room_in_its_folder_and_its_memory_goes_with_its_owner(tmp_path):
    """Docker's /dev/shm has 64 MB. Another process of the user reads it by the same name."""
    bucket = SharedBucket("small", 4096, folder=tmp_path)
    bucket.data[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert bucket.path.is_symlink() and bucket.path.stat().st_dev != tmp_path.stat().st_dev
    command = [sys.executable, "-c", "import sys; print(*open(sys.argv[1], 'rb').read(4))", str(bucket.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1 2 3 0\n"
    os.utime(bucket.path, (0, 0), follow_symlinks=False)
    assert sweep(tmp_path) == [], "its owner lives"
    bucket.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "megatron-pmd-dead").symlink_to("/proc/4194305/fd/3")  # no process has this number
    os.utime(tmp_path / "megatron-pmd-dead", (0, 0), follow_symlinks=False)
    assert sweep(tmp_path) == [tmp_path / "megatron-pmd-dead"]


def test_a_bucket_that_no_memory_is_left_for_says_how_much_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ModelError, match=r"weight bucket of 1,125,899,906,842,624 bytes: .*1,000"):
        SharedBucket("large", 2**50, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_cannot_take_pages_in_advance_makes_a_bucket_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_module, "MADV_POPULATE_WRITE", 9999)  # as Linux before 5.14 answers 23
    made = SharedBucket("old-kernel", 1 << 16, tmp_path)
    made.data.fill_(7)
    assert int(made.data.sum()) == 7 << 16
    made.close()
