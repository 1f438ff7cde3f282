"""What is sent to an engine, without one."""

from __future__ import annotations

import ast
import io
import pickle
from typing import Any

import megatron.core  # noqa: F401  # puts its own function in the place of torch.storage._load_from_bytes
import torch

from megatron_pmd.engine.control import pickled_by_value
from megatron_pmd.engine.installed_options import sglang_source


def allowed_globals() -> set[tuple[str, str]]:
    """(module, name) that the installed SGLang's unpickler lets through, read from its source."""
    tree = ast.parse((sglang_source() / "utils" / "common.py").read_text())
    unpickler = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SafeUnpickler"
    )
    values = {
        node.targets[0].id: node.value
        for node in unpickler.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    by_hand = {("torch.storage", "_load_from_bytes")}  # find_class puts a safe function in its place
    return ast.literal_eval(values["ALLOWED_GLOBALS"]) | by_hand


class Recording(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add((module, name))
        return super().find_class(module, name)


def test_a_tensor_sent_by_value_names_only_what_sglangs_unpickler_lets_through() -> None:
    value = [("bucket", torch.arange(5, dtype=torch.uint8))]
    reading = Recording(pickled_by_value(value))
    [(name, tensor)] = reading.load()
    assert name == "bucket" and torch.equal(tensor, value[0][1])
    assert reading.named <= allowed_globals()


def test_pickle_alone_still_names_megatrons_function() -> None:
    """When this fails, pickled_by_value is needed no more."""
    reading = Recording(pickle.dumps([("bucket", torch.zeros(1))]))
    reading.load()
    assert reading.named - allowed_globals() == {("megatron.core.safe_globals", "safe_load_from_bytes")}
