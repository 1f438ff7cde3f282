"""What the options of an engine say, and which are refused; no engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import Rollout
from megatron_pmd.engine.sglang_server import engine_options, expert_parallel
from megatron_pmd.errors import ConfigError
from recipes import recipe
from tests.engine.live_engine import spec_for


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_a_cache_in_fp8_is_refused_because_no_update_carries_its_scales(kind: str, tmp_path: Path) -> None:
    rollout = Rollout(max_total_tokens=64, sglang={"kv_cache_dtype": kind})
    with pytest.raises(ConfigError, match=rf"rollout\.sglang\.kv_cache_dtype='{kind}' needs scales"):
        engine_options(spec_for(tmp_path, tmp_path, rollout=rollout))
    plain = Rollout(max_total_tokens=64, sglang={"kv_cache_dtype": "bf16"})
    assert engine_options(spec_for(tmp_path, tmp_path, rollout=plain))["kv_cache_dtype"] == "bf16"


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, 1),
        ({"ep_size": 4}, 4),
        ({"moe_a2a_backend": "deepep"}, 8),
        ({"moe_a2a_backend": "none", "ep_size": 2}, 2),
        ({"ep_size": 8, "enable_eplb": True}, 1),
        ({"ep_size": 8, "ep_num_redundant_experts": 8}, 1),
        ({"ep_size": 8, "init_expert_location": "placement.json"}, 1),
        ({"ep_size": 4, "moe_dp_size": 2}, 1),
    ],
)
def test_experts_are_shared_out_only_where_their_places_follow_from_the_options(
    options: dict[str, Any], shares: int
) -> None:
    """SGLang: an all-to-all backend sets ep_size to tp_size; a balancer moves experts while it serves."""
    assert expert_parallel(Rollout(tensor_parallel=8, sglang=options)) == shares


def test_the_largest_recipes_engines_divide_their_experts_over_all_ranks() -> None:
    names = ("qwen3_30b_a3b_dapo_32xh100", "qwen3_235b_a22b_128xh100", "deepseek_v3_256xh100")
    assert [expert_parallel(recipe(name).rollout) for name in names] == [1, 8, 32]
