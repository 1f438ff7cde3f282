"""What is wrong with a model folder is said by its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_pmd.errors import ModelError, PmdError
from megatron_pmd.hugging_face import INDEX, TensorFiles


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": ', f"{INDEX}: not JSON"),
        (b'{"weight_map": "\xff"}', f"{INDEX}: not JSON"),
        (b"{}", f"{INDEX}: no weight_map in it"),
        (
            b'{"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}}',
            f"1-of-2.safetensors is not there, nor are 1 more, of the 2 files that {INDEX} names; copy what",
        ),
    ],
)
def test_an_index_that_is_none_or_names_files_that_are_not_there_is_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(PmdError, match=message) as refused:
        TensorFiles(tmp_path)
    assert refused.value.refuses


@pytest.mark.parametrize(
    ("scales", "found"), [({}, "is missing"), ({"x_scales": torch.zeros(2, 4, 3)}, r"has shape \[2, 4, 3\]")]
)
def test_blocks_in_mxfp4_without_their_scales_are_named(
    tmp_path: Path, scales: dict[str, torch.Tensor], found: str
) -> None:
    tensors = {"x_blocks": torch.zeros(2, 4, 2, 16), **scales}
    save_file({name: tensor.byte() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"x_blocks has shape \[2, 4, 2, 16\], and x_scales {found}"):
        TensorFiles(tmp_path)
