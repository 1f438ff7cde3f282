"""What the options of an engine say of it; no engine is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_pmd.config import AgentProgram, Model, Rollout, override
from megatron_pmd.engine.families import NEEDS_GPUS, NO_ENGINE
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.installed_options import check_options, check_parsers, sglang_source
from megatron_pmd.engine.sglang_server import (
    OUR_OPTIONS,
    EngineProcess,
    EngineSpec,
    engine_options,
    expert_parallel,
)
from megatron_pmd.errors import ConfigError, ModelError
from recipes import RECIPES, configuration, recipe


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


@pytest.mark.parametrize(
    "option", ["enable_dp_attention", "enable_tp_lm_head_all_to_all", "disable_cuda_graph"]
)
def test_an_option_that_sglang_takes_from_no_file_is_refused_before_an_engine_would_die_of_it(option) -> None:
    """Old spellings, and pairs of --flag and --no-flag; server_args_config_parser.py, unsupported_actions."""
    with pytest.raises(ConfigError, match=f"{option} is not an option of the installed SGLang"):
        check_options({option: True}, {})


@pytest.mark.parametrize(
    ("setting", "name", "near"), [("tool_parser", "qwen2", "qwen"), ("reasoning_parser", "qwen4", "qwen3")]
)
def test_a_parser_that_sglang_has_not_is_refused_with_the_nearest(setting, name, near) -> None:
    with pytest.raises(ConfigError, match=rf"agent\.{setting}='{name}' is no parser .*did you mean {near}"):
        check_parsers(AgentProgram(function="a:b", **{setting: name}))
    check_parsers(AgentProgram(function="a:b", **{setting: near}))


def test_every_option_of_a_recipe_is_one_that_an_engine_starts_with() -> None:
    for name in RECIPES:
        check_options(recipe(name).rollout.sglang, OUR_OPTIONS)


@pytest.mark.parametrize("cpu", [True, False])
def test_an_engine_that_is_paused_in_place_ends_each_step_before_it_looks_for_requests(cpu: bool) -> None:
    """SGLang's event_loop_normal; in event_loop_overlap a step is under way when the pause comes."""
    settings = ["rollout.placement=separate", "rollout.staleness=1", "rollout.max_total_tokens=8192"]
    config = override(recipe("tiny_moe_cpu"), [*settings, "rollout.pause=in_place"])
    spec = EngineSpec.of_run(config, 0, log=None, cpu=cpu, port=1)
    assert engine_options(spec)["disable_overlap_schedule"] is True


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "with rollout.staleness=0: no response runs while the engines take weights"),
        (
            ["rollout.staleness=1", 'rollout.sglang={"disable_overlap_schedule": false}'],
            "the step that is under way would compute with weights that change",
        ),
    ],
)
def test_a_pause_in_place_is_refused_where_nothing_runs_and_where_a_step_would_run_on(
    settings: list[str], reason: str
) -> None:
    settings = ["rollout.placement=separate", "rollout.pause=in_place", *settings]
    with pytest.raises(ConfigError, match=reason):
        override(recipe("tiny_moe_cpu"), settings)


@pytest.mark.parametrize("kind", [*NEEDS_GPUS, *NO_ENGINE])
def test_a_model_of_which_no_engine_starts_is_refused_before_a_start_with_the_reason(
    tmp_path: Path, kind: str
) -> None:
    """tests/engine/test_every_family.py shows how each of them would die."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    model, rollout, log = Model(path=str(tmp_path)), Rollout(max_total_tokens=8192), tmp_path / "engine.log"
    spec = EngineSpec(number=0, model=model, rollout=rollout, port=1, log=log, seed=0, cpu=True)
    for machine, reasons in {"a CPU": NEEDS_GPUS | NO_ENGINE, "GPUs": NO_ENGINE}.items():
        here = replace(spec, cpu=machine == "a CPU")
        if kind not in reasons:
            assert engine_options(here)["model_path"] == str(tmp_path)
            continue
        with pytest.raises(ModelError) as refusal:
            EngineProcess(here)
        assert f"for models of type {kind}: {reasons[kind]}" in str(refusal.value)
    assert not [*tmp_path.glob("engine*")], "nothing was started, and nothing written"


@pytest.mark.parametrize("published", ["bf16", "fp8"])
@pytest.mark.parametrize("fp8", [True, False])
def test_weights_that_are_sent_are_what_the_run_says_and_those_that_are_read_what_their_folder_says(
    tmp_path: Path, published: str, fp8: bool
) -> None:
    """SGLang takes the files of a model in blockwise FP8 for values with scales; those in bf16 have none."""
    own = {"quantization_config": {"quant_method": "fp8"}} if published == "fp8" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"} | own))
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    model, rollout = Model(path=str(tmp_path)), Rollout(fp8=fp8)
    spec = EngineSpec(number=0, model=model, rollout=rollout, port=1, log=None, seed=0, cpu=False)
    sent = json.loads(engine_options(spec).get("json_model_override_args", "{}"))
    if fp8:
        assert sent["quantization_config"]["weight_block_size"] == [128, 128]
    else:
        assert sent == ({"quantization_config": None} if own else {})
    read = engine_options(replace(spec, load_model_weights=True))
    assert not read.keys() & {"json_model_override_args", "quantization"}


SEPARATE = ["rollout.placement=separate", "rollout.partial=null", "layout.data=4", "layout.expert=4"]


@pytest.mark.parametrize(
    ("settings", "rank", "gpu"),
    [
        ([], 0, 4),
        ([], 3, 7),
        (["rollout.ranks_per_engine=4", "rollout.tensor_parallel=4"], 0, 4),
        (["rollout.ranks_per_engine=2", "rollout.tensor_parallel=2"], 2, 6),
    ],
)
def test_separate_engines_take_the_gpus_behind_those_of_the_nodes_four_ranks(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], rank: int, gpu: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = configuration("tiny_moe_cpu", [*SEPARATE, "rollout.ranks_per_engine=1", *settings])
    fleet: Any = Fleet.__new__(Fleet)
    fleet._config = config
    assert fleet._first_gpu() == gpu
    spec = EngineSpec(
        number=0, model=config.model, rollout=config.rollout, port=1, log=None, seed=0, cpu=False,
        first_gpu=gpu,
    )  # fmt: skip
    options = engine_options(spec)
    assert options["base_gpu_id"] == gpu
    assert "enable_memory_saver" not in options, "nobody else needs their memory"


@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        ("gpt_oss", {}, True),
        ("gpt_oss", {"moe_runner_backend": "triton"}, False),
        ("glm4_moe", {}, False),
        ("glm4_moe", {"moe_runner_backend": "triton_kernel"}, True),
    ],
)
def test_engines_that_would_record_no_experts_are_refused_where_these_are_to_be_replayed(
    tmp_path: Path, kind: str, options: dict[str, Any], refused: bool
) -> None:
    """SGLang takes triton_kernel for gpt-oss by itself, and forward_cuda of its TopK then has no numbers."""
    source = sglang_source()
    assert '"triton_kernel"' in (source / "arg_groups/model_overrides/gpt_oss.py").read_text()
    topk = (source / "layers/moe/topk.py").read_text().partition("def forward_cuda")[2]
    in_kernel = topk.partition("TopKOutputFormat.TRITON_KERNEL:\n")[2].partition("elif")[0]
    assert "return TritonKernelTopKOutput" in in_kernel and "capture" not in in_kernel
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    spec = EngineSpec(
        number=0, model=Model(path=str(tmp_path)), rollout=Rollout(sglang=options), port=1, log=None, seed=0,
        cpu=False, record_routing=True,
    )  # fmt: skip
    if not refused:
        assert engine_options(spec)["enable_return_routed_experts"]
        return
    with pytest.raises(ConfigError, match=r'records none; set rollout.sglang=.*"triton"'):
        engine_options(spec)
