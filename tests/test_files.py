"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_pmd.files import whole_file, write_whole


def test_a_write_that_fails_leaves_the_earlier_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "the first")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half of the sec")
        raise ZeroDivisionError
    assert path.read_text() == "the first"


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_whole(path, b"\x00old")
    with whole_file(path) as partial:
        partial.write_bytes(b"\x00new")
        assert path.read_bytes() == b"\x00old"
    assert path.read_bytes() == b"\x00new" and os.listdir(tmp_path) == ["data"]


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "τ ≤ π_t")
    assert (tmp_path / "text").read_bytes() == b"\xcf\x84 \xe2\x89\xa4 \xcf\x80_t"


def test_a_private_file_is_private_from_its_first_byte_also_where_others_were_readable(
    tmp_path: Path,
) -> None:
    path, left = tmp_path / "keys", tmp_path / "keys.partial"
    for readable in (path, left):
        readable.write_text("old")
        readable.chmod(0o644)
    with whole_file(path, mode=0o600) as partial:
        assert partial.stat().st_mode & 0o777 == 0o600
        partial.write_text("secret")
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "secret"
