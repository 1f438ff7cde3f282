"""Weight buckets, without an engine: layout, shared memory, and what a reader refuses."""

from __future__ import annotations

import json
import logging
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.bucket import ALIGNMENT, BucketLayout, SharedBucket
from megatron_pmd.weight_sync.loader import BucketError, load_bucket, read_bucket, reply_path

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.bool,
    torch.int64,
]


@pytest.fixture
def bucket(tmp_path: Path):
    bucket = SharedBucket("test", 1 << 16, folder=tmp_path)
    yield bucket
    bucket.close()


class Recorder:
    """A model that keeps what it is given, as SGLang's models receive it."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights):
        self.loaded = {name: tensor.clone() for name, tensor in weights}


def deliver(model, description, folder: Path) -> dict:
    """Call the loader as SGLang does: the description is one byte tensor."""
    body = json.dumps(description | {"reply": str(folder / "reply")}).encode()
    load_bucket(model, [("bucket", torch.frombuffer(bytearray(body), dtype=torch.uint8))])
    return json.loads(reply_path(str(folder / "reply"), 0).read_text())


def test_every_tensor_starts_on_a_cache_line_and_none_overlap():
    layout = BucketLayout(4096)
    for number, extent in enumerate([1, 3, 64, 65, 0, 7]):
        layout.add(f"t{number}", "bfloat16", (extent,))
    ends = [0] + [e.offset + e.nbytes for e in layout.entries.values()]
    starts = [e.offset for e in layout.entries.values()] + [layout.used]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert all(start >= end for start, end in zip(starts, ends, strict=True))


def test_a_layout_survives_json():
    layout = BucketLayout(4096)
    layout.add("a", "float32", (3, 5))
    layout.add("scalar", "int64", ())
    layout.add("b", "float8_e4m3fn", (7,))
    assert BucketLayout.from_json(4096, json.loads(json.dumps(layout.as_json()))) == layout


def test_fits_counts_the_padding_of_every_tensor():
    layout = BucketLayout(2 * ALIGNMENT)
    assert layout.fits(1, 1) and layout.fits(ALIGNMENT, ALIGNMENT) and layout.fits(ALIGNMENT + 1)
    assert not layout.fits(1, 1, 1) and not layout.fits(ALIGNMENT + 1, 1)


def test_a_full_bucket_names_the_tensor_and_the_setting():
    layout = BucketLayout(128)
    with pytest.raises(ModelError, match=r"big \(400 bytes\).*sync\.bucket_megabytes"):
        layout.add("big", "float32", (100,))


def test_a_tensor_exported_twice_is_refused():
    layout = BucketLayout(4096)
    layout.add("same", "float32", (1,))
    with pytest.raises(ModelError, match="same was exported twice"):
        layout.add("same", "float32", (1,))


def test_every_dtype_and_layout_of_memory_arrives_bit_for_bit(bucket, tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (5, 7)).to(dtype) for dtype in DTYPES}
    tensors |= {"transposed": torch.randn(4, 6).T, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 3)}
    for name, tensor in tensors.items():
        bucket.place(name, tensor)
    model = Recorder()
    reply = deliver(model, bucket.description(), tmp_path)
    assert reply == {"bucket": "test#1", "tensors": len(tensors), "error": None}
    assert list(model.loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert model.loaded[name].dtype == tensor.dtype and torch.equal(model.loaded[name], tensor), name


def test_a_bucket_is_used_again_without_traces_of_its_last_filling(bucket):
    bucket.place("long", torch.full((100,), 7.0))
    bucket.description()
    bucket.clear()
    assert bucket.empty
    bucket.place("short", torch.ones(3))
    [(name, tensor)] = read_bucket(bucket.description())
    assert name == "short" and torch.equal(tensor, torch.ones(3))


def test_a_changed_byte_is_refused_by_the_buckets_name_and_nothing_is_loaded(bucket, tmp_path):
    bucket.place("w", torch.randn(1000))
    description = bucket.description()
    bucket.data[1234] ^= 1
    model = Recorder()
    reply = deliver(model, description, tmp_path)
    assert "weight bucket test#1" in reply["error"] and "checksum" in reply["error"]
    assert not model.loaded


def test_another_size_or_a_missing_file_is_refused_by_name(bucket):
    bucket.place("w", torch.randn(10))
    with pytest.raises(BucketError, match=r"test#1.*has 65536 bytes, expected 65600"):
        read_bucket(bucket.description() | {"bytes": 65600})
    bucket.close()
    with pytest.raises(BucketError, match=r"test#2.*No such file"):
        read_bucket(bucket.description())


def test_a_model_that_fails_is_reported_and_does_not_raise(bucket, tmp_path):
    class Refuses:
        def load_weights(self, weights):
            raise ValueError("expected 4 experts")

    bucket.place("w", torch.randn(10))
    assert deliver(Refuses(), bucket.description(), tmp_path)["error"] == "ValueError: expected 4 experts"


def test_a_weight_the_model_does_not_know_is_an_error(bucket, tmp_path):
    """SGLang's models only log a warning, and go on serving the old values."""

    class Warns:
        def load_weights(self, weights):
            for name, _ in weights:
                logging.getLogger("sglang.srt.models.any").warning(
                    f"Parameter {name} not found in params_dict"
                )

    bucket.place("model.nonsense", torch.randn(10))
    error = deliver(Warns(), bucket.description(), tmp_path)["error"]
    assert "model.nonsense not found" in error and "test#1" in error


def test_a_reader_that_writes_does_not_change_the_bucket(bucket):
    bucket.place("w", torch.ones(10))
    [(_, tensor)] = read_bucket(bucket.description())
    tensor.zero_()
    [(_, again)] = read_bucket(bucket.description())
    assert torch.equal(again, torch.ones(10))


def test_the_file_is_private_and_goes_with_the_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from megatron_pmd.weight_sync.bucket import SharedBucket\n"
        "bucket = SharedBucket('exit', 4096, folder=Path(sys.argv[1]))\n"
        "print(oct(bucket.path.stat().st_mode))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert stat.S_IMODE(int(printed.stdout, 8)) == 0o600
    assert not list(tmp_path.iterdir())
