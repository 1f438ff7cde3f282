"""What is wrong with a model folder is said by its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.errors import PmdError
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
