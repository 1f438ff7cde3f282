"""A conversion goes on where it was killed, and where the disk was full; several ranks share one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.actor.further_tokens import FILE
from tests.actor.launch import launch
from tests.convert.command_line import tensors
from tests.convert.conftest import FURTHER, PROGRAMS

pytestmark = pytest.mark.slow


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def test_a_killed_conversion_goes_on_and_does_no_part_twice(variants, converted, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(AssertionError, match="ended with -9"):
        launch("to_megatron", module=PROGRAMS, model=variants / "llama, tied", out=out, kill_at=3)
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("__[012]_0.distcp")}
    assert len(done) == 3
    launch("to_megatron", module=PROGRAMS, model=variants / "llama, tied", out=out)
    assert not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    whole = converted[0] / "llama, tied/megatron"
    assert files(out) == files(whole)
    assert (out / "conversion.json").read_bytes() == (whole / "conversion.json").read_bytes()


def test_two_ranks_write_what_one_does(variants, converted, tmp_path):
    cases = {
        name: (converted[0] / name / "megatron", variants / name, tmp_path / name)
        for name in ("llama", "qwen3moe")
    }
    launch("to_hf", module=PROGRAMS, ranks=2, cases=cases)
    for name in cases:
        alone, together = converted[0] / name / "hf", tmp_path / name
        assert {p.name for p in alone.iterdir()} == {p.name for p in together.iterdir()}
        for path in alone.glob("*.safetensors"):
            assert path.read_bytes() == (together / path.name).read_bytes()
    launch("to_megatron", module=PROGRAMS, ranks=2, model=variants / "qwen3moe", out=tmp_path / "megatron")
    assert files(tmp_path / "megatron") == files(converted[0] / "qwen3moe/megatron")


def test_a_full_disk_publishes_nothing_and_the_same_command_goes_on(variants, converted, tmp_path):
    checkpoint = converted[0] / "llama/megatron"
    found = launch(
        "disk_full", module=PROGRAMS, model=variants / "llama", checkpoint=checkpoint, out=tmp_path
    )[0]
    for direction, folder in (("to megatron", "megatron.partial"), ("to hf", "hf.partial")):
        kind, message = found[direction]
        assert kind == "CheckpointError"
        assert folder in message and "is the disk full?" in message and "goes on where" in message
        assert found[f"{direction}, again"] == ("", "")
    assert found["published"] == ("", "")
    before, after = tensors(variants / "llama"), tensors(tmp_path / "hf")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", dict(tensor=2)),
        ("deepseek, further tokens", dict(expert=2, data=2)),
        ("qwen3_next, further tokens", dict(pipeline=2)),
    ],
    ids=["tensor=2", "expert=2", "pipeline=2"],
)
def test_megatron_loads_the_checkpoint_and_exports_it_again_under_any_layout(
    variants, converted, tmp_path, family, layout
):
    model, checkpoint, out = (
        variants / family,
        converted[0] / family / "megatron",
        tmp_path / "hf/iteration-4",
    )
    ranks = launch(
        "load_as_megatron_does", module=PROGRAMS, ranks=2,
        model=model, checkpoint=checkpoint, layout=layout, out=out,
    )  # fmt: skip
    expected = tensors(model)
    written = tensors(out)
    assert written.keys() == expected.keys()
    further = set(load_file(model / FILE)) if family in FURTHER else set()
    for held in ranks:
        assert held.keys() == expected.keys() - further
    for held in (*ranks, written):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    # what training writes is what a conversion writes
    assert [path.name for path in out.parent.iterdir()] == ["iteration-4"]
    training, conversion = (
        json.loads((folder / "conversion.json").read_text()) for folder in (out, converted[0] / family / "hf")
    )
    hashes = [{k: v["sha256"] for k, v in of["tensors"].items()} for of in (training, conversion)]
    assert hashes[0] == hashes[1]
    assert training["untrained"].keys() == conversion["untrained"].keys() == further
    assert (out / "config.json").read_bytes() == (converted[0] / family / "hf/config.json").read_bytes()
