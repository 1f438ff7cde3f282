"""From the bytes of an engine's response to arrays, against what Python's json makes of the same bytes."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from megatron_pmd import engine
from megatron_pmd.engine.installed_options import sglang_source
from megatron_pmd.errors import EngineError
from megatron_pmd.rollout.engine_answer import parse_answer, recorded_experts


def body(**information: Any) -> bytes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 150_000, 500).tolist()
    # an fp32 number as SGLang sends it: with the digits of a double
    log_probs = [float(np.float32(value)) for value in -rng.exponential(1.0, 500)]
    known = {
        "id": "0a", "finish_reason": {"type": "stop", "matched": 2}, "weight_version": "4",
        "output_token_logprobs": [[p, t, None] for p, t in zip(log_probs, tokens, strict=True)],
        "input_token_logprobs": [], "e2e_latency": 1.5,
    }  # fmt: skip
    return json.dumps({"output_ids": tokens, "meta_info": known | information}).encode()


def test_tokens_and_log_probs_are_those_in_the_json_bit_for_bit():
    expected = json.loads(body())
    answer = parse_answer(body())
    assert answer.tokens.dtype == np.int32 and answer.tokens.tolist() == expected["output_ids"]
    listed = [entry[0] for entry in expected["meta_info"]["output_token_logprobs"]]
    assert answer.log_probs.dtype == np.float32 and answer.log_probs.tolist() == listed
    assert (answer.spans, answer.finish_reason["matched"]) == ([(len(answer.tokens), "4")], 2)
    assert answer.routed_experts is None


def test_an_answer_without_a_token_is_empty():
    nothing = {"output_ids": [], "meta_info": {"weight_version": None, "finish_reason": {"type": "abort"}}}
    answer = parse_answer(json.dumps(nothing).encode())
    assert (len(answer.tokens), len(answer.log_probs), answer.spans) == (0, 0, [(0, None)])


@pytest.mark.parametrize("wrong", [b"", b"[]", b'{"output_ids": [1], "meta_info": {}}', b'{"error": "no"}'])
def test_what_is_no_answer_is_a_decode_error_which_the_client_repeats(wrong):
    with pytest.raises(msgspec.DecodeError):
        parse_answer(wrong)


EXPERTS = np.random.default_rng(1).integers(0, 128, (9, 3, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint8])
def test_recorded_experts_come_in_any_width_and_take_one_byte_each(dtype):
    sent = base64.b64encode(EXPERTS.astype(dtype).tobytes()).decode()
    data = parse_answer(body(routed_experts=sent)).routed_experts
    assert data is not None
    found = recorded_experts(data, tokens=10, width=6)
    assert found.tolist() == EXPERTS.reshape(9, 6).tolist()
    assert found.dtype == (np.uint16 if dtype == np.int16 else np.uint8)


def test_experts_of_another_model_or_of_no_model_are_refused():
    data = EXPERTS.astype(np.int32).tobytes()
    with pytest.raises(EngineError, match="216 bytes of experts for 9 tokens, which is not the 8 experts"):
        recorded_experts(data, tokens=10, width=8)
    with pytest.raises(EngineError, match="experts from -1 to"):
        recorded_experts((EXPERTS - EXPERTS.min() - 1).astype(np.int32).tobytes(), tokens=10, width=6)


def plugin() -> ModuleType:
    path = Path(engine.__path__[0]) / "plugins" / "megatron_pmd_engine.py"
    spec = importlib.util.spec_from_file_location("megatron_pmd_engine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [([0, 255], torch.uint8), ([0, 256], torch.int16), ([0, 40_000], torch.int32), ([-1, 3], torch.int32)],
)
def test_the_engine_sends_the_smallest_type_that_holds_the_numbers(experts, dtype):
    sent = plugin().narrowed(torch.tensor(experts, dtype=torch.int32))
    assert sent.dtype == dtype and sent.tolist() == experts


def test_sglang_has_the_functions_that_the_plugin_hooks():
    """Read from its source: to import it takes longer than all tests here."""
    module = plugin()
    for target in (module.REQUEST, module.RECORD):
        *path, class_name, function = target.split(".")[2:]  # less sglang.srt
        found = sglang_source().joinpath(*path).with_suffix(".py")
        files = [found, found.with_name("base.py")]  # where the recorder has it from
        nodes = [node for file in files if file.exists() for node in ast.parse(file.read_text()).body]
        classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        bases = [base.id for base in classes[class_name].bases if isinstance(base, ast.Name)]
        members = [node for name in (class_name, *bases) if name in classes for node in classes[name].body]
        assert function in {node.name for node in members if isinstance(node, ast.FunctionDef)}, target
