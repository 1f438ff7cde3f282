"""The plan of an engine's memory beside SGLang's own functions, which are called as they are installed."""

from __future__ import annotations
import __future__

import ast
import copy
import itertools
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pmd.config import override
from megatron_pmd.engine.installed_options import sglang_source
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner import memory
from megatron_pmd.planner.engine_reserve import MIB, engine_reserve, mem_fraction_static
from megatron_pmd.planner.hardware import H100, H200, Assumptions, Device
from megatron_pmd.planner.planning import make_plan
from recipes import RECIPES, recipe

ON_GPUS = [name for name in RECIPES if not name.endswith("_cpu")]
H100_MACHINES = load_cluster("h100").machines


SGLANG = sglang_source()  # before by_sglang puts another `sglang` in its place


def functions_of(file: str) -> dict[str, Any]:
    """SGLang's functions in this file of srt/, as installed. An import takes 10 s and, on a CPU, stubs."""
    tree = ast.parse((SGLANG / file).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    found: dict[str, Any] = {}
    exec(compile(tree, file, "exec", __future__.annotations.compiler_flag), found)
    return found


@pytest.fixture
def by_sglang(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Device, bool], float]:
    """mem_fraction_static as SGLang's handle_gpu_memory_settings declares it; the rest of it is played."""
    graphs = functions_of("arg_groups/cuda_graph_hook.py")
    graphs["resolving_view"] = lambda settings: settings
    played = {
        "sglang.srt.arg_groups.cuda_graph_hook": graphs,
        "sglang.srt.arg_groups.model_overrides.qwen3_vl": {
            "expand_multimodal_decode_graph_to_running_limit": lambda *_: None
        },
    }
    for name, content in played.items():
        for parent in itertools.accumulate(name.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(content)

    def resolve(config: Any, device: Device, latent: bool) -> float:
        options = config.rollout.sglang
        decode = SimpleNamespace(backend="full", max_bs=options.get("cuda_graph_max_bs_decode"), bs=None)
        prefill = SimpleNamespace(backend="breakable", max_bs=None, bs=None)
        groups = options.get("attn_dp_size", 1)
        settings = SimpleNamespace(
            device="cuda", tp_size=config.rollout.tensor_parallel, pp_size=1, model_path="m", dp_size=1,
            attn_dp_size=groups, enable_dp_attention=groups > 1,
            moe_a2a_backend=options.get("moe_a2a_backend", "none"), chunked_prefill_size=None,
            max_running_requests=config.rollout.max_running_requests, max_total_tokens=None,
            cuda_graph_config=SimpleNamespace(decode=decode, prefill=prefill), mem_fraction_static=None,
            disaggregation_mode="null", speculative_algorithm=None, disable_cuda_graph_padding=False,
            enable_symm_mem=False,
        )  # fmt: skip
        hook = functions_of("arg_groups/memory_hook.py")
        played_here = {
            "copy": copy,
            "Backend": SimpleNamespace(DISABLED="disabled", BREAKABLE="breakable", FULL="full"),
            "Phase": SimpleNamespace(DECODE="decode", PREFILL="prefill"),
            "declare_resolution": lambda _, __, **values: vars(settings).update(values),
            "resolving_view": lambda arguments: arguments,
            "resolved_view": lambda arguments: arguments,
            "attn_dp_enabled_of": lambda arguments: arguments.enable_dp_attention,
            "get_device_memory_capacity": lambda _: device.memory_bytes / MIB,
            "use_mla_backend": lambda _: latent,
            "model_config_of": lambda _: SimpleNamespace(is_multimodal=False),
            "post_capture_kv_sizing_planned": lambda _: False,  # of engines with the memory saver
            "get_platform": lambda: SimpleNamespace(is_xpu=False),
        }
        hook.update(played_here)  # the functions' own globals
        hook["handle_gpu_memory_settings"](settings)
        return float(settings.mem_fraction_static)

    return resolve


def without(name: str, *options: str) -> Any:
    """A recipe whose engines are not given these options of SGLang."""
    config = recipe(name)
    left = {key: value for key, value in config.rollout.sglang.items() if key not in options}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": left})})


@pytest.mark.parametrize("device", [H100, H200], ids=lambda device: device.name)
@pytest.mark.parametrize("name", ON_GPUS)
def test_the_share_that_sglang_gives_an_engine_is_the_plans(by_sglang, name, device):
    config = without(name, "mem_fraction_static")
    shape = make_plan(config, H100_MACHINES).shape
    latent = shape.attention.key_value_heads is None
    assert mem_fraction_static(shape, config, device.memory_bytes) == pytest.approx(
        by_sglang(config, device, latent), abs=0.0011
    )


def test_attention_data_parallelism_with_large_graphs_reserves_half_of_an_h100(by_sglang):
    """What recipes/deepseek.py sets cuda_graph_max_bs_decode for."""
    config = without("deepseek_v3_256xh100", "mem_fraction_static", "cuda_graph_max_bs_decode")
    shape = make_plan(config, H100_MACHINES).shape
    config = override(config, ["rollout.max_running_requests=512"])
    assert mem_fraction_static(shape, config, H100.memory_bytes) == pytest.approx(0.498, abs=0.001)
    assert by_sglang(config, H100, True) == pytest.approx(0.498, abs=0.001)


@pytest.mark.parametrize("name", ON_GPUS)
def test_every_gpu_recipe_sizes_its_engines_with_what_stays_beside_them(name):
    """Weights, cache, graphs, activations, contexts and NCCL's buffers fit; without the option not."""
    plan = make_plan(recipe(name), H100_MACHINES)
    assert sum(plan.phases["rollout"].values()) <= 0.95 * H100.memory_bytes
    careless = make_plan(without(name, "mem_fraction_static"), H100_MACHINES)
    [problem] = [p for p in careless.problems if p.startswith("rollout")]
    words = problem.split("set mem_fraction_static=")[1].split()
    options = careless.config.rollout.sglang | {"mem_fraction_static": float(words[0])}
    rollout = careless.config.rollout.model_copy(update={"sglang": options})
    advised = make_plan(careless.config.model_copy(update={"rollout": rollout}), H100_MACHINES)
    assert [p for p in advised.problems if p.startswith("rollout")] == []


def test_a_device_has_a_communicator_for_each_group_of_more_than_one_rank():
    """TP 4, EP 8, DP 8 on 32 ranks: tensor, data, expert, expert data, model (tensor), all, node."""
    assert memory.actor_communicators(recipe("qwen3_30b_a3b_dapo_32xh100")) == 7
    single = override(
        recipe("qwen2_5_7b_dapo_8xh100"), ["layout.tensor=1", "layout.data=1", "rollout.tensor_parallel=1"]
    )
    assert memory.actor_communicators(single) == 0
    assume = Assumptions()
    alone = memory.actor_left_over_bytes(single, assume)
    assert alone == assume.cuda_context_bytes + assume.fragment_bytes


def test_cuda_graphs_stay_beside_the_actor():
    """What an engine with larger graphs keeps is missing in the update, byte for byte."""
    plans = []
    for running in (64, 128):
        config = override(recipe("moonlight_16b_a3b_16xh100"), [f"rollout.max_running_requests={running}"])
        plans.append(make_plan(config, H100_MACHINES))
    small, large = plans
    graphs = [engine_reserve(p.shape, p.config, H100.memory_bytes).graphs for p in (small, large)]
    assert graphs[1] - graphs[0] == 2 * 64 * MIB
    assert large.phases["update"]["left-overs"] - small.phases["update"]["left-overs"] == 2 * 64 * MIB


def test_on_a_cpu_an_engine_reserves_nothing():
    plan = make_plan(recipe("tiny_moe_cpu"), load_cluster("lab").machines)
    assert plan.phases["rollout"]["left-overs"] == 0.0
    assert plan.phases["rollout"]["engine graphs, activations"] == 0.0
