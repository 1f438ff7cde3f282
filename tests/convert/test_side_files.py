"""What goes with exported weights says the same to transformers 5 and SGLang, and in 4's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sglang.srt.utils.hf_transformers import get_config

from megatron_pmd.convert.side_files import copy_side_files
from tests.actor.tiny_models import COMMON, FAMILIES

FORMER: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": None},
    "llama3": {"rope_theta": 1e4, "rope_scaling": {"factor": 32.0, "rope_type": "llama3"}},
    "qwen3moe": {"rope_theta": 1e6, "rope_scaling": None, "num_experts": 4},
    "deepseek": {
        "rope_theta": 1e4,
        "rope_scaling": {"factor": 40.0, "mscale_all_dim": 0.8},
        "n_routed_experts": 4,
    },
}
"""In the words of transformers 4.57's configuration classes."""


def config_of(family: str) -> Any:
    name, settings = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**COMMON, **settings})


def exported(source: Path, target: Path) -> dict[str, Any]:
    target.mkdir()
    copy_side_files(source, target, dtype=torch.bfloat16)
    return json.loads((target / "config.json").read_text())


def same(read: Any, written: Any) -> None:
    """Two configurations, but for the notes on who wrote them and the dtype."""
    notes = {"dtype", "transformers_version", "_name_or_path", "architectures"}
    first, second = ({k: v for k, v in c.to_dict().items() if k not in notes} for c in (read, written))
    assert {k: first.get(k) for k in second} == second


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_and_sglang_read_what_the_source_says(tmp_path: Path, family: str) -> None:
    written = config_of(family)
    written.save_pretrained(tmp_path / "source")
    config = exported(tmp_path / "source", tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    same(transformers.AutoConfig.from_pretrained(tmp_path / "out"), written)
    read = get_config(str(tmp_path / "out"), trust_remote_code=False)
    rope = {key: value for key, value in read.rope_parameters.items() if key != "type"}  # SGLang's own
    assert rope == written.rope_parameters
    if family == "qwen3moe":
        assert read.num_experts == 4


@pytest.mark.parametrize("family", FORMER)
def test_the_words_of_transformers_4_are_there_whoever_wrote_the_source(tmp_path: Path, family: str) -> None:
    config_of(family).save_pretrained(tmp_path / "source")
    config = exported(tmp_path / "source", tmp_path / "out")
    for key, value in FORMER[family].items():
        found = config[key]
        assert found == value or found.items() >= value.items()
    # as transformers 4 writes it, without the others; a second export, of that, has both again
    for key in ("rope_parameters", "dtype", *(["num_local_experts"] if family == "qwen3moe" else [])):
        del config[key]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    again = exported(tmp_path / "out", tmp_path / "again")
    assert again["rope_parameters"]["rope_theta"] == FORMER[family]["rope_theta"]
    same(transformers.AutoConfig.from_pretrained(tmp_path / "again"), config_of(family))


def test_a_tokenizer_of_transformers_5_gets_the_name_that_both_know(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<tool>": 3}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", extra_special_tokens=["<tool>"]
    )
    config_of("llama").save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    exported(tmp_path / "source", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(said.get("extra_special_tokens", {}), dict)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a b <tool>").input_ids == tokenizer("a b <tool>").input_ids
    assert (read.eos_token, read.all_special_tokens) == (tokenizer.eos_token, tokenizer.all_special_tokens)


@pytest.mark.parametrize("family", ["deepseek", "moonlight"])
def test_sglang_finds_what_transformers_fixes_for_a_family_and_does_not_write(
    tmp_path: Path, family: str
) -> None:
    """It reads config.moe_layer_freq without a default (models/deepseek_v2.py, _is_layer_sparse)."""
    config_of(family).save_pretrained(tmp_path / "source")
    assert "moe_layer_freq" not in json.loads((tmp_path / "source" / "config.json").read_text())
    exported(tmp_path / "source", tmp_path / "out")
    read = get_config(str(tmp_path / "out"), trust_remote_code=False)
    assert (read.moe_layer_freq, read.scoring_func, read.topk_method) == (1, "sigmoid", "noaux_tc")


def test_what_a_source_says_of_its_scores_stays(tmp_path: Path) -> None:
    config_of("deepseek").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scoring_func": "softmax"}))
    assert exported(tmp_path / "source", tmp_path / "out")["scoring_func"] == "softmax"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Gemma2", dict(hidden_activation="gelu_pytorch_tanh"), {"hidden_act": "gelu_pytorch_tanh"}),
        # as published: each fourth layer has full attention
        ("Qwen3Next", dict(num_hidden_layers=8), {"full_attention_interval": 4}),
    ],
)
def test_what_sglang_reads_and_transformers_5_does_not_write_is_written(
    tmp_path: Path, name: str, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    getattr(transformers, f"{name}Config")(**settings).save_pretrained(tmp_path / "source")
    source = json.loads((tmp_path / "source" / "config.json").read_text())
    assert not expected.keys() & source.keys(), "it is written: side_files.py needs not write it"
    config = exported(tmp_path / "source", tmp_path / "out")
    assert {key: config[key] for key in expected} == expected
    same(
        transformers.AutoConfig.from_pretrained(tmp_path / "out"),
        transformers.AutoConfig.from_pretrained(tmp_path / "source"),
    )
