"""What shows of the tests that need the CUDA packages without them: when they are collected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import WITH_CUDA_PACKAGES, pytest_ignore_collect

PROJECT = Path(__file__).parents[2]


def called(*words: str) -> Any:
    """pytest as it was called from the checkout's root."""
    return SimpleNamespace(args=list(words), invocation_params=SimpleNamespace(dir=PROJECT))


@pytest.mark.parametrize("words", [["tests"], ["tests/tools", "tests/engine"], ["tests/gpu_contract_else"]])
@pytest.mark.parametrize("folder", WITH_CUDA_PACKAGES, ids=lambda folder: folder.name)
def test_what_needs_the_cuda_packages_is_left_out_where_nobody_names_it(
    folder: Path, words: list[str]
) -> None:
    assert pytest_ignore_collect(folder, called(*words)) is True
    assert pytest_ignore_collect(folder.with_name("tools"), called(*words)) is None


@pytest.mark.parametrize("folder", WITH_CUDA_PACKAGES, ids=lambda folder: folder.name)
def test_it_is_collected_where_it_is_named(folder: Path) -> None:
    inside = f"tests/{folder.name}/test_imports.py::test_it"
    for word in (f"tests/{folder.name}", inside, str(folder)):
        assert pytest_ignore_collect(folder, called("tests/tools", word)) is None
