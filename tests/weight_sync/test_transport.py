"""How weights reach engines, where the way itself is under test; whole updates are in the other files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.errors import EngineError
from megatron_pmd.weight_sync.bucket import SharedBucket
from megatron_pmd.weight_sync.transport import Disk
from tests.weight_sync.filling import fill


def test_a_file_for_engines_that_the_system_does_not_let_be_written_is_named(tmp_path) -> None:
    fleet: Any = SimpleNamespace(leads=False)
    control: Any = SimpleNamespace(is_driver=True)
    disk, bucket = Disk(fleet, control, tmp_path / "weights"), SharedBucket("of-disk", 1 << 12, tmp_path)
    disk.begin()
    (tmp_path / "weights" / "model-00001.safetensors").mkdir()  # in the way of the next
    try:
        fill(bucket, {"a": torch.zeros(3)})
        with pytest.raises(EngineError, match=r"weights for the engines cannot be written: .*director"):
            disk.load(bucket, [])
    finally:
        bucket.close()
