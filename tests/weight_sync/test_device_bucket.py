"""The way into another process's device memory, as far as it goes without one."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_pmd.weight_sync import device_bucket, loader
from megatron_pmd.weight_sync.bucket import SharedBucket
from megatron_pmd.weight_sync.bucket_layout import BucketLayout
from megatron_pmd.weight_sync.device_bucket import HANDLE_ARGUMENTS, DeviceBucket, open_handle

SENT = (b"\x00handle", 4096, 512, False, b"counter", 3, b"\xffevent", True)
"""What a sender's torch puts behind the device: see reduce_tensor."""


def test_torch_still_takes_a_handles_parts_in_the_order_that_they_are_sent_in():
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[:HANDLE_ARGUMENTS] == [
        "tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype",
        "storage_device",
    ]  # fmt: skip
    assert names[HANDLE_ARGUMENTS:] == [
        "storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad", "ref_counter_handle",
        "ref_counter_offset", "event_handle", "event_sync_required",
    ]  # fmt: skip


def test_a_handle_survives_json_and_is_opened_as_bytes_of_the_readers_own_device(monkeypatch):
    bucket = DeviceBucket("key", 4096)
    own = (torch.Tensor, (4096,), (1,), 0, torch.UntypedStorage, torch.uint8, 5)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda data: (None, (*own, *SENT)))
    handle = json.loads(json.dumps(bucket.handle()))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: arguments)
    monkeypatch.setattr(device_bucket, "current_device", lambda: torch.device("cuda", 1))
    assert open_handle(handle, 4096) == (*own[:-1], 1, *SENT)


class Model:
    def load_weights(self, weights):
        self.loaded = {name: tensor.clone() for name, tensor in weights}

    def named_parameters(self):
        return []


@pytest.fixture
def opened(monkeypatch):
    """A bucket, and the handles that it was opened by."""
    bucket, count = DeviceBucket("key", 4096), list[object]()

    def open_handle(handle, nbytes):
        count.append(handle)
        return bucket.data

    monkeypatch.setattr(loader, "open_handle", open_handle)
    yield bucket, count
    loader._opened.clear()


def described(bucket, value: float, **more):
    bucket.begin(BucketLayout(bucket.capacity))
    entry = bucket.layout.add("w", "float32", (10,))
    bucket.tensor(entry).fill_(value)
    return bucket.description(handle=["ab", 1]) | more


def test_the_reader_keeps_a_bucket_open_until_the_update_ends(opened):
    bucket, count = opened
    model = Model()
    for value, more in ((1.0, {}), (2.0, {"ends": True}), (3.0, {})):
        loader.load_description(model, described(bucket, value, **more))
        assert model.loaded["w"].tolist() == [value] * 10
    assert len(count) == 2


def test_a_changed_byte_on_the_device_is_refused_by_name(opened):
    bucket, _ = opened
    description = described(bucket, 1.0)
    bucket.data[3] ^= 1
    with pytest.raises(
        loader.BucketError, match=r"weight bucket key#1: tensor w on this rank's device has not"
    ):
        loader.read_bucket(description)


def test_a_handle_that_the_driver_does_not_open_is_refused_by_the_buckets_name(opened, monkeypatch):
    def refuse(handle, nbytes):
        raise RuntimeError("CUDA error: invalid resource handle\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(loader, "open_handle", refuse)
    expected = (
        r"weight bucket key#1: its CUDA IPC handle does not open on device .*: "
        r"CUDA error: invalid resource handle; does the rank that sent it live"
    )
    with pytest.raises(loader.BucketError, match=expected):
        loader.read_bucket(described(opened[0], 1.0))


def test_buckets_in_memory_and_on_a_device_are_described_alike(tmp_path):
    shared, own = SharedBucket("key", 4096, folder=tmp_path), DeviceBucket("key", 4096)
    for bucket in (shared, own):
        bucket.data.zero_()
        bucket.layout.add("w", "float32", (10,))
    one, other = shared.description(), own.description(handle=[])
    assert one.pop("path") == str(shared.path) and other.pop("handle") == []
    assert one | {"reply": ""} == other | {"reply": ""}
    shared.close()
