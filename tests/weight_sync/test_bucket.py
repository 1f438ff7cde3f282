"""Weight buckets, without an engine: layout, shared memory, and what a reader refuses."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync import loader
from megatron_pmd.weight_sync.bucket import SharedBucket, sweep
from megatron_pmd.weight_sync.bucket_layout import ALIGNMENT, BucketLayout, flattened, word_sum
from megatron_pmd.weight_sync.loader import BucketError, load_bucket, read_bucket
from tests.weight_sync.filling import fill

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


@pytest.fixture(autouse=True)
def new_process():
    """What the loader knows of its model it forgets with the engine's process."""
    yield
    loader._read_before.clear()


class Recorder(torch.nn.Module):
    """A model that keeps what it is given, as SGLang's models receive it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights):
        self.loaded = {name: tensor.clone() for name, tensor in weights}


def deliver(model, description, folder: Path) -> dict:
    """Call the loader as SGLang does: the description is one byte tensor."""
    body = json.dumps(description | {"reply": str(folder / "reply")}).encode()
    load_bucket(model, [("bucket", torch.frombuffer(bytearray(body), dtype=torch.uint8))])
    return json.loads((folder / "reply").read_text())


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


@pytest.mark.parametrize("sizes, fit", [
    ((1, 1), True), ((ALIGNMENT, ALIGNMENT), True), ((ALIGNMENT + 1,), True),
    ((1, 1, 1), False), ((ALIGNMENT + 1, 1), False),
])  # fmt: skip
def test_a_tensors_padding_takes_room_too(sizes, fit):
    layout = BucketLayout(2 * ALIGNMENT)
    with contextlib.nullcontext() if fit else pytest.raises(ModelError, match="does not fit"):
        for number, nbytes in enumerate(sizes):
            layout.add(str(number), "uint8", (nbytes,))


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
    model = Recorder()
    reply = deliver(model, fill(bucket, tensors), tmp_path)
    assert reply == {"bucket": "test#1", "failures": [None]}
    assert list(model.loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert model.loaded[name].dtype == tensor.dtype and torch.equal(model.loaded[name], tensor), name


def test_a_message_without_gaps_is_cut_up_by_sglang_into_the_same_tensors(bucket):
    """SGLang refuses a tensor that does not start at a multiple of its element's size."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    tensors = {f"w{i}": torch.randn(3, 2 * i + 1).to(dtype) for i, dtype in enumerate(DTYPES)}
    fill(bucket, tensors)
    entries = flattened(bucket.layout.entries.values())
    message = torch.cat([bucket.tensor(entry).reshape(-1).view(torch.uint8) for entry in entries])
    names, dtypes, shapes = zip(*((e.name, e.dtype, e.shape) for e in entries), strict=True)
    received = FlattenedTensorBucket.empty(names, dtypes, shapes, "cpu")
    received.get_flattened_tensor().copy_(message)
    came = dict(received.reconstruct_tensors())
    assert came.keys() == tensors.keys()
    assert all(torch.equal(came[n].view(torch.uint8), tensors[n].view(torch.uint8)) for n in tensors)


def test_a_bucket_is_used_again_without_traces_of_its_last_filling(bucket):
    fill(bucket, {"long": torch.full((100,), 7.0)})
    [(name, tensor)] = read_bucket(fill(bucket, {"short": torch.ones(3)}))
    assert name == "short" and torch.equal(tensor, torch.ones(3))


def test_a_changed_byte_is_refused_by_the_buckets_name_and_nothing_is_loaded(bucket, tmp_path):
    description = fill(bucket, {"w": torch.randn(1000)})
    bucket.data[1234] ^= 1
    model = Recorder()
    reply = deliver(model, description, tmp_path)
    [failure] = reply["failures"]
    assert "weight bucket test#1: tensor w" in failure and "checksum" in failure
    assert not model.loaded


def test_another_size_or_a_missing_file_is_refused_by_name(bucket):
    description = fill(bucket, {"w": torch.randn(10)})
    with pytest.raises(BucketError, match=r"test#1.*has 65536 bytes, expected 65600"):
        read_bucket(description | {"bytes": 65600})
    bucket.close()
    with pytest.raises(BucketError, match=r"test#2.*No such file"):
        read_bucket(bucket.description())


def test_a_model_that_fails_is_reported_and_does_not_raise(bucket, tmp_path):
    class Refuses(torch.nn.Module):
        def load_weights(self, weights):
            raise ValueError("expected 4 experts")

    reply = deliver(Refuses(), fill(bucket, {"w": torch.randn(10)}), tmp_path)
    assert reply["failures"] == ["ValueError: expected 4 experts"]


class Drops(torch.nn.Module):
    """As SGLang's Qwen3-MoE: fuses, cuts, and passes over what it has no place for, without a word."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.fused = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)

    def load_weights(self, weights):
        cached = {}
        for name, tensor in weights:
            if name.startswith("half"):
                cached[name] = tensor.view(2, 3)
            elif tensor.shape[0] == 10 and tensor.t() is not None:
                continue
        if len(cached) == 2:
            self.fused.data.copy_(torch.cat(list(cached.values()), dim=0))


def test_a_tensor_that_the_model_drops_without_a_word_is_an_error_by_name(bucket, tmp_path):
    halves = {name: torch.ones(6) for name in ("half.0", "half.1")}
    model = Drops()
    error = deliver(model, fill(bucket, halves | {"model.nonsense": torch.randn(10)}), tmp_path)["failures"][
        0
    ]
    assert "no place for 1 of its tensors" in error and "model.nonsense" in error and "test#1" in error
    # a second try says the same: the engine did not learn to know it
    again = deliver(model, fill(bucket, {"model.nonsense": torch.randn(10)}), tmp_path)["failures"][0]
    assert "model.nonsense" in again
    assert deliver(model, fill(bucket, halves), tmp_path)["failures"] == [None]
    assert torch.equal(model.fused.data, torch.ones(4, 3))


def test_an_output_layer_that_is_the_embedding_is_dropped_rightly(bucket, tmp_path):
    head = {"lm_head.weight": torch.randn(10)}
    assert deliver(Drops(tie_word_embeddings=True), fill(bucket, head), tmp_path)["failures"] == [None]
    loader._read_before.clear()
    assert deliver(Drops(tie_word_embeddings=False), fill(bucket, head), tmp_path)["failures"] != [None]


def test_an_expert_that_one_rank_reads_is_not_lost_because_another_passes_over_it():
    assert (
        loader._lost([{"experts.0": True, "experts.1": False}, {"experts.0": False, "experts.1": True}]) == []
    )
    assert loader._lost([{"experts.0": True, "w": False}, {"experts.0": True, "w": False}]) == ["w"]


def test_a_reader_that_writes_does_not_change_the_bucket(bucket):
    [(_, tensor)] = read_bucket(fill(bucket, {"w": torch.ones(10)}))
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


def unsigned(tensor: torch.Tensor, word: int) -> int:
    return int(word_sum(tensor, word)) % 2**64


def test_the_sums_of_parts_add_up_to_the_whole_and_equal_numpys():
    torch.manual_seed(0)
    weight = torch.randn(6, 8).to(torch.bfloat16)
    expected = int(weight.view(torch.int16).numpy().view(np.uint64).sum(dtype=np.uint64))
    assert unsigned(weight, 8) == expected
    rows, columns = [weight[:2], weight[2:]], [weight[:, :4], weight[:, 4:]]
    for parts in (rows, columns):
        assert sum(unsigned(part, 8) for part in parts) % 2**64 == expected
    assert unsigned(weight[1:5].view(2, 2, 8)[:, 1:], 8) == unsigned(weight[[2, 4]], 8)


def test_a_part_whose_rows_are_shorter_than_a_word_is_summed_all_the_same():
    bias = torch.arange(12, dtype=torch.bfloat16)
    words = bias.view(torch.int16).numpy().view(np.uint64)
    assert unsigned(bias[2:10].view(4, 2), 8) == int(
        bias[2:10].view(torch.int16).numpy().view(np.uint64).sum()
    )
    assert unsigned(bias.view(6, 2), 8) == int(words.sum())
    assert unsigned(torch.empty(0, 3), 4) == 0


class Waits(TorchDispatchMode):
    """Counts the numbers that are read from a device one by one, as if the CPU were one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_checking_a_bucket_waits_for_the_device_once_however_many_tensors_it_has(bucket):
    description = fill(bucket, {f"t{number}": torch.randn(10) for number in range(50)})
    with Waits() as waits:
        read_bucket(description)
    assert waits.count == 0, "all sums are read together"


def test_ranks_of_a_node_fill_one_bucket_between_them(tmp_path):
    owner = SharedBucket("shared", 4096, folder=tmp_path)
    other = SharedBucket("shared", 4096, folder=tmp_path, owner=False)
    whole = torch.randn(4, 6)
    for bucket in (owner, other):
        bucket.layout = BucketLayout(4096)
        bucket.layout.add("w", "float32", (4, 6))
    entry = owner.layout.entries["w"]
    owner.tensor(entry)[:, :3] = whole[:, :3]
    other.tensor(entry)[:, 3:] = whole[:, 3:]
    [(_, tensor)] = read_bucket(owner.description())
    assert torch.equal(tensor, whole)
    other.close()
    assert owner.path.exists()  # it is not the other's to remove
    owner.close()
    with pytest.raises(ModelError, match="cannot be opened"):
        SharedBucket("shared", 4096, folder=tmp_path, owner=False)


def test_a_killed_processs_bucket_is_swept_and_a_living_ones_is_not(tmp_path, bucket):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron_pmd.weight_sync.bucket import SharedBucket\n"
        "bucket = SharedBucket('killed', 4096, folder=Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert {p.name for p in tmp_path.iterdir()} == {"megatron-pmd-killed", "megatron-pmd-test"}
    assert sweep(tmp_path) == []  # another process may have made it just now, and not have locked it yet
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    assert sweep(tmp_path) == [tmp_path / "megatron-pmd-killed"]
    assert [p.name for p in tmp_path.iterdir()] == ["megatron-pmd-test"]


class TestUpdate:
    """What the loader keeps of an update, from its first bucket to the list in its last."""

    MANIFEST = (["a", "float32", [3]], ["b", "float32", [2, 2]])

    def send(self, bucket, folder, names: str, name: str, manifest=None, **changes) -> str | None:
        tensors = {tensor: torch.ones(3) if tensor == "a" else torch.ones(2, 2) for tensor in names}
        update = {"name": name} | ({} if manifest is None else {"manifest": manifest})
        description = fill(bucket, tensors) | {"update": update | changes}
        return deliver(Recorder(), description, folder)["failures"][0]

    def test_an_update_with_every_announced_tensor_is_complete(self, bucket, tmp_path):
        assert self.send(bucket, tmp_path, "a", "1#1") is None
        assert self.send(bucket, tmp_path, "b", "1#1", self.MANIFEST) is None

    def test_a_dropped_tensor_fails_by_name(self, bucket, tmp_path):
        assert self.send(bucket, tmp_path, "a", "2#1", self.MANIFEST) == (
            "BucketError: update 2#1: tensor b did not come"
        )

    def test_an_update_given_up_half_way_does_not_complete_the_next(self, bucket, tmp_path):
        assert self.send(bucket, tmp_path, "b", "3#1") is None
        assert "tensor b did not come" in (self.send(bucket, tmp_path, "a", "3#2", self.MANIFEST) or "")

    def test_a_tensor_that_nobody_announced_or_that_comes_twice_fails_by_name(self, bucket, tmp_path):
        assert "tensor c came, which nobody" in (
            self.send(bucket, tmp_path, "abc", "4#1", self.MANIFEST) or ""
        )
        assert self.send(bucket, tmp_path, "a", "5#1") is None
        assert "tensor a came twice" in (self.send(bucket, tmp_path, "ab", "5#1", self.MANIFEST) or "")

    def test_another_shape_fails_by_name_and_says_both(self, bucket, tmp_path):
        manifest = (["a", "float32", [4]], self.MANIFEST[1])
        error = self.send(bucket, tmp_path, "ab", "6#1", manifest) or ""
        assert "tensor a came as float32 [3], not float32 [4]" in error


class Linear(torch.nn.Module):
    """A model of two parameters that loads as SGLang's do: into its own, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(4), requires_grad=False) for _ in range(2))
        self.ignores: str | None = None

    def load_weights(self, weights):
        for name, tensor in weights:
            wanted = tensor + 0
            if name != self.ignores:
                getattr(self, name).data.copy_(wanted)


def verify(model: Linear, bucket: SharedBucket, folder: Path, spoil: bool = False) -> str | None:
    """Both tensors, then both again as a verification, one bucket each."""
    errors = []
    for again in (False, True):
        for number, name in enumerate("ab"):
            description = fill(bucket, {name: torch.full((4,), number + 1.0)})
            position: dict[str, object] = {"name": folder.name}
            if again:
                position |= {"verify": "first" if name == "a" else "next", "verify_last": name == "b"}
            errors.append(deliver(model, description | {"update": position}, folder)["failures"][0])
        if spoil:
            model.a.data[2] = 7.0
    return next((error for error in errors if error), None)


def test_full_verification_passes_for_what_was_sent_and_leaves_it_loaded(bucket, tmp_path):
    model = Linear()
    assert verify(model, bucket, tmp_path) is None
    assert model.a.tolist() == [1.0] * 4 and model.b.tolist() == [2.0] * 4


def test_full_verification_names_a_parameter_that_is_not_what_was_sent(bucket, tmp_path):
    model = Linear()
    error = verify(model, bucket, tmp_path, spoil=True) or ""
    assert "1 parameters of the engine were not what the actor sent: a" in error


def test_full_verification_names_a_parameter_that_nothing_is_loaded_into(bucket, tmp_path):
    model = Linear()
    model.ignores = "b"
    assert "were not what the actor sent: b" in (verify(model, bucket, tmp_path) or "")
