"""What SGLang makes of every recipe's engine options on an H100."""

from __future__ import annotations

import pytest

from megatron_pmd.engine.sglang_server import LOADER, NO_WEIGHTS
from tests.gpu_contract.engine_arguments import arguments_of, decided, spec_of
from tests.gpu_contract.model_folders import ON_GPUS, configured


@pytest.mark.parametrize("name", ON_GPUS)
def test_sglang_takes_every_option_of_a_recipe_as_it_was_meant(name, models, tmp_path):
    config = configured(name, models)
    rollout, found = config.rollout, decided(arguments_of(spec_of(config, tmp_path)))
    print(
        name,
        {
            field: getattr(found, field)
            for field in (
                "attention_backend",
                "moe_runner_backend",
                "chunked_prefill_size",
                "mem_fraction_static",
                "sampling_backend",
                "page_size",
                "quantization",
                "fp8_gemm_runner_backend",
                "ep_size",
                "dp_size",
                "cuda_graph_config",
                "disable_overlap_schedule",
            )
            if hasattr(found, field)
        },
    )
    assert found.device == "cuda" and found.dtype == "bfloat16"
    assert found.tp_size == rollout.tensor_parallel
    assert found.load_format == "dummy" and found.weight_version == NO_WEIGHTS
    assert found.custom_weight_loader == [LOADER]
    assert found.enable_memory_saver and found.skip_tokenizer_init
    for option, value in rollout.sglang.items():
        if not option.startswith("cuda_graph"):
            assert getattr(found, option) == value, option
