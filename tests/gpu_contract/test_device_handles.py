"""A bucket's way into another process's device memory, through torch's functions up to those in C."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from torch.multiprocessing import reductions

from megatron_pmd.weight_sync import device_bucket
from megatron_pmd.weight_sync.device_bucket import DeviceBucket, open_handle

SHARED = (0, b"\x00handle", 4096, 512, b"counter", 3, b"\xffevent", True)
"""What a storage on a device says of itself, to be opened elsewhere (torch/csrc/StorageSharing.cpp)."""


class Storage:
    """Of a tensor on a device."""

    device = torch.device("cuda", 0)
    _cdata = 0

    @property
    def _untyped_storage(self) -> Storage:
        return self

    def _share_cuda_(self) -> tuple[Any, ...]:
        return SHARED

    def _weak_ref(self) -> int:
        return 0


class OnDevice(SimpleNamespace):
    """What torch asks a tensor of 4,096 bytes on a device."""

    requires_grad, is_leaf, is_nested, layout, dtype = False, True, False, torch.strided, torch.uint8
    _backward_hooks = None

    def _typed_storage(self) -> Storage:
        return Storage()

    def size(self) -> torch.Size:
        return torch.Size([4096])

    def stride(self) -> tuple[int, ...]:
        return (1,)

    def storage_offset(self) -> int:
        return 0


@pytest.fixture(params=["torch alone", "patched by SGLang"])
def reader(request, monkeypatch) -> Any:
    """torch's functions as an engine's process has them: SGLang puts others in their places."""
    for name in ("reduce_tensor", "rebuild_cuda_tensor"):
        monkeypatch.setattr(
            reductions, name, getattr(reductions, f"_{name}_original", getattr(reductions, name))
        )
    send: Callable[..., Any] = reductions.reduce_tensor  # an actor's rank knows nothing of SGLang
    if request.param == "patched by SGLang":
        for name in ("_reduce_tensor_original", "_rebuild_cuda_tensor_original"):
            monkeypatch.delattr(reductions, name, raising=False)
        monkey_patch_torch_reductions()
        assert reductions.rebuild_cuda_tensor.__module__ == "sglang.srt.utils.patch_torch"
    opened: list[tuple[Any, ...]] = []

    def open_shared(*arguments: Any) -> torch.UntypedStorage:
        opened.append(arguments)
        return torch.UntypedStorage(4096)

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", staticmethod(open_shared), raising=False)
    monkeypatch.setattr(reductions, "shared_cache", {})
    monkeypatch.setattr(reductions, "StorageWeakRef", lambda storage: storage)
    monkeypatch.setattr(reductions, "storage_from_cache", lambda kind, key: None)
    monkeypatch.setattr(device_bucket, "current_device", lambda: torch.device("cuda", 5))
    return send, opened


def test_what_torch_says_of_a_bucket_reaches_torch_in_the_engine_for_the_engines_own_device(
    reader, monkeypatch
):
    send, opened = reader
    bucket: Any = DeviceBucket.__new__(DeviceBucket)
    bucket.data = OnDevice()
    with monkeypatch.context() as sender:
        sender.setattr(reductions, "reduce_tensor", send)
        handle = json.loads(json.dumps(bucket.handle()))
    tensor = open_handle(handle, 4096)
    assert (tensor.shape, tensor.dtype) == ((4096,), torch.uint8)
    assert opened == [(5, *SHARED[1:])]
