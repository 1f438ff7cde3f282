"""What of the contract shows without its environment: when it is collected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import CONTRACT, pytest_ignore_collect

PROJECT = Path(__file__).parents[2]


def called(*words: str) -> Any:
    """pytest as it was called from the checkout's root."""
    return SimpleNamespace(args=list(words), invocation_params=SimpleNamespace(dir=PROJECT))


@pytest.mark.parametrize("words", [["tests"], ["tests/tools", "tests/engine"], ["tests/gpu_contract_else"]])
def test_the_contract_is_left_out_where_nobody_names_it(words: list[str]) -> None:
    assert pytest_ignore_collect(CONTRACT, called(*words)) is True
    assert pytest_ignore_collect(CONTRACT.with_name("tools"), called(*words)) is None


@pytest.mark.parametrize(
    "word", ["tests/gpu_contract", "tests/gpu_contract/test_imports.py::test_it", str(CONTRACT)]
)
def test_the_contract_is_collected_where_it_is_named(word: str) -> None:
    assert pytest_ignore_collect(CONTRACT, called("tests/tools", word)) is None
