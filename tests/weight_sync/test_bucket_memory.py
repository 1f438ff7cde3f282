"""Where a weight bucket is when /dev/shm has no room for it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.bucket import SharedBucket, sweep


def test_a_bucket_that_shared_memory_is_too_small_for_is_elsewhere_in_memory(tmp_path, monkeypatch):
    """Docker's /dev/shm has 64 MB. Another process of the user reads it by the same name, and none other."""
    fallocate = os.posix_fallocate

    def full(descriptor, offset, size):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    bucket = SharedBucket("small", 4096, folder=tmp_path)
    bucket.data[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
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
