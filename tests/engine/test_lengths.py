"""Samples that do not fit into the model are refused by the settings' names, before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.utils.hf_transformers.common import get_context_length
from transformers import LlamaConfig

from megatron_pmd.config import RunConfig, override
from megatron_pmd.engine.lengths import check_lengths, positions_of
from megatron_pmd.errors import ConfigError
from recipes import recipe

YARN = {"rope_type": "yarn", "factor": 4.0}


def config_of(folder: Path, *settings: str, **described: Any) -> RunConfig:
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128, **described}))
    lengths = [
        "batch.max_prompt_tokens=96",
        "batch.max_response_tokens=32",
        "batch.max_tokens_per_microbatch=999",
    ]
    return override(recipe("tiny_moe_cpu"), [f"model.path={folder}", *lengths, *settings])


def test_a_sample_may_have_as_many_tokens_as_the_model_has_positions(tmp_path: Path) -> None:
    check_lengths(config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"=96 \+ .*=64 are 160 tokens, and the model has 128 .* by 32"):
        check_lengths(config_of(tmp_path, "batch.max_response_tokens=64"))


def test_the_engines_own_limit_is_named_where_it_is_the_lower_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"100 positions \(rollout\.sglang\.context_length\)"):
        check_lengths(config_of(tmp_path, 'rollout.sglang={"context_length": 100}'))


@pytest.mark.parametrize(
    "rope", [YARN, YARN | {"original_max_position_embeddings": 32}, {"rope_type": "default"}]
)
def test_positions_are_those_that_sglang_counts(rope: dict[str, Any]) -> None:
    described = LlamaConfig(max_position_embeddings=128, rope_parameters=rope | {"rope_theta": 1e4})
    assert positions_of(json.loads(described.to_json_string())) == get_context_length(described)
