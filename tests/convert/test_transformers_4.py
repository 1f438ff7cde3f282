"""Exported folders in the hands of what people read them with: transformers 4.57 and SGLang.

`make transformers-4` puts the former beside the stack, and runs this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
import transformers

from megatron_pmd.convert.side_files import copy_side_files
from megatron_pmd.engine.sglang_server import EngineProcess
from tests.actor.tiny_models import FAMILIES, write_model
from tests.convert import transformers_4
from tests.convert.transformers_4 import TEXT, TOKENS
from tests.engine.live_engine import START_SECONDS, spec_for

INSTALLED = os.environ.get("PMD_TRANSFORMERS_4")
pytestmark = pytest.mark.skipif(not INSTALLED, reason="`make transformers-4` installs it and runs this")

SERVED_ON_A_CPU = [family for family in FAMILIES if family not in ("moonlight", "deepseek")]
"""SGLang 0.5.23 has no latent attention there (layers/attention/torch_native_backend.py)."""


def with_tokenizer(folder: Path) -> None:
    """Words, in a tokenizer.json and nothing more."""
    words = {
        word: number for number, word in enumerate(["?", "What", "is", "12", "+", "34", "<end>", "<tool>"])
    }
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", extra_special_tokens=["<tool>"]
    )
    tokenizer.save_pretrained(folder)


def export(source: Path, target: Path) -> None:
    """As `convert` and training write a folder; the weights are the source's."""
    target.mkdir(parents=True)
    copy_side_files(source, target, dtype=torch.float32)
    for file in source.glob("*.safetensors*"):
        shutil.copyfile(file, target / file.name)


def log_probs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def read_by_4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Models of all families and their exports; what transformers 4 computes of these, and writes."""
    folder = tmp_path_factory.mktemp("transformers-4")
    for family in FAMILIES:
        write_model(folder / "source" / family, family)
        with_tokenizer(folder / "source" / family)
        export(folder / "source" / family, folder / "exports" / family)
    program = [sys.executable, "-W", "ignore", transformers_4.__file__]
    environment = os.environ | {"PYTHONPATH": str(INSTALLED), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*program, folder / "exports", folder / "of-4"], env=environment, check=True)
    return folder, json.loads((folder / "of-4" / "results.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_computes_of_an_export_what_5_computes_of_its_source(
    read_by_4: tuple[Path, dict[str, Any]], family: str
) -> None:
    folder, results = read_by_4
    expected = log_probs(folder / "source" / family)
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.tensor(results[family]["log_probs"]), expected, atol=1e-4, rtol=0)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "source" / family / "tokenizer.json"))
    assert results[family]["tokens"] == tokenizer.encode(TEXT).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_of_what_transformers_4_wrote_is_read_alike_by_5(
    read_by_4: tuple[Path, dict[str, Any]], tmp_path: Path, family: str
) -> None:
    """And by 4: its own words are unchanged in the export."""
    folder, _ = read_by_4
    export(folder / "of-4" / family, tmp_path / "export")
    torch.testing.assert_close(
        log_probs(tmp_path / "export"), log_probs(folder / "source" / family), atol=1e-4, rtol=0
    )
    before, after = (
        json.loads((path / "config.json").read_text())
        for path in (folder / "of-4" / family, tmp_path / "export")
    )
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("family", SERVED_ON_A_CPU)
@pytest.mark.parametrize("written_by", ["source", "of-4"])
def test_sglang_computes_of_an_export_what_transformers_computes_of_its_source(
    read_by_4: tuple[Path, dict[str, Any]], tmp_path: Path, written_by: str, family: str
) -> None:
    """of-4: the source is one that transformers 4 wrote."""
    folder, _ = read_by_4
    export(folder / written_by / family, tmp_path / "export")
    engine = EngineProcess(spec_for(tmp_path / "export", tmp_path, load_model_weights=True))
    try:
        engine.wait_ready(START_SECONDS)
        request = {
            "input_ids": TOKENS, "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        }  # fmt: skip
        reply = httpx.post(f"{engine.spec.url}/generate", json=request, timeout=60, trust_env=False)
    finally:
        engine.stop()
    assert reply.status_code == 200, reply.text
    found = [entry[0] for entry in reply.json()["meta_info"]["input_token_logprobs"][1:]]
    expected = log_probs(folder / "source" / family)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
