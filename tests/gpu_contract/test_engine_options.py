"""What SGLang makes of every recipe's engine options on an H100."""

from __future__ import annotations

import argparse

import pytest
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.installed_options import server_options
from megatron_pmd.engine.sglang_server import LOADER, NO_WEIGHTS
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.engine_reserve import mem_fraction_static
from megatron_pmd.planner.hardware import H100
from megatron_pmd.planner.planning import make_plan
from recipes import recipe
from tests.gpu_contract.engine_arguments import arguments_of, decided, spec_of
from tests.gpu_contract.model_folders import ON_GPUS, configured

ATTENTION = "fa3"
"""SGLang's choice on Hopper for all recipes, latent attention included: its own FlashAttention 3."""


def without(config: RunConfig, option: str) -> RunConfig:
    """An engine that is not told this."""
    left = {name: value for name, value in config.rollout.sglang.items() if name != option}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": left})})


def test_every_option_that_we_let_through_is_one_that_sglang_takes_from_a_file():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    taken = ConfigArgumentMerger(parser)
    flags = {word.removeprefix("--") for action in parser._actions for word in action.option_strings}
    assert {flag for flag in server_options().values() if flag not in flags} == set()
    assert {name for name in server_options() if name in taken.unsupported_actions} == set()


@pytest.mark.parametrize("name", ON_GPUS)
def test_sglang_takes_every_option_of_a_recipe_as_it_was_meant(name, models, tmp_path):
    config = configured(name, models)
    rollout, found = config.rollout, decided(arguments_of(spec_of(config, tmp_path)))
    assert found.device == "cuda" and found.dtype == "bfloat16"
    assert found.tp_size == rollout.tensor_parallel and found.dp_size == 1
    assert found.load_format == "dummy" and found.weight_version == NO_WEIGHTS
    assert found.custom_weight_loader == [LOADER]
    # engines with devices of their own release nothing
    assert found.enable_memory_saver == (rollout.placement == "colocated")
    assert found.skip_tokenizer_init
    assert found.attention_backend == ATTENTION
    assert found.max_running_requests == rollout.max_running_requests
    for option, value in rollout.sglang.items():
        if not option.startswith("cuda_graph"):
            assert getattr(found, option) == value, option
    graphs = found.cuda_graph_config.decode
    assert graphs.backend == "full"
    assert graphs.max_bs == rollout.sglang.get("cuda_graph_max_bs_decode", graphs.max_bs)


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_memory_that_sglang_gives_an_engine_by_itself_is_the_plans(name, models, tmp_path):
    config = without(configured(name, models), "mem_fraction_static")
    found = decided(arguments_of(spec_of(config, tmp_path))).mem_fraction_static
    shape = make_plan(recipe(name), load_cluster("h100").machines).shape
    assert mem_fraction_static(shape, config, H100.memory_bytes) == pytest.approx(found, abs=0.0011)
