"""Variables of the environment, read back where the library reads them."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from megatron_pmd.engine.sglang_server import EngineSpec, NodeSpan, engine_environment
from megatron_pmd.node.caches import FOLDERS, keep_compiled_kernels
from tests.gpu_contract.engine_arguments import spec_of
from tests.gpu_contract.model_folders import configured
from tests.gpu_contract.programs import run

READ_IN_COMPILING = {"CUDA_CACHE_PATH", "TVM_FFI_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "EP_JIT_CACHE_DIR"}
"""By the driver, or inside the call that compiles: no value is there before (tests/node/test_caches.py)."""


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory) -> tuple[dict[str, str], dict[str, Any]]:
    """The environment of an engine over two nodes that records routing, and what such a process finds."""
    folder = tmp_path_factory.mktemp("engine")
    config = configured("qwen3_30b_a3b_dapo_32xh100", models, "actor.experts.replay_routing=true")
    plain = spec_of(config, folder)
    spec = EngineSpec(**{**plain.__dict__, "span": NodeSpan(2, 0, "127.0.0.3:29500")})
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            patch.delenv(name, raising=False)
        patch.setenv("PMD_SCRATCH", str(folder))
        patch.setenv("SGLANG_WARMUP_TIMEOUT", "1234")
        before = dict(os.environ)
        keep_compiled_kernels("node", {"sglang": metadata.version("sglang")})
        environment = engine_environment(spec)
        for name in os.environ.keys() - before.keys():
            patch.delenv(name)
    return environment, run("engine_process", folder / "found.json", environment=environment)


def test_sglang_reads_what_an_engine_is_started_with(engine):
    environment, found = engine
    read = found["environment"]
    assert read["SGLANG_TIMEOUT_KEEP_ALIVE"] == 86400
    assert read["SGLANG_HEALTH_CHECK_TIMEOUT"] == int(environment["SGLANG_HEALTH_CHECK_TIMEOUT"])
    assert read["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] is False
    assert read["SGLANG_WARMUP_TIMEOUT"] == 1234
    assert read["SGLANG_HOST_IP"] == "127.0.0.3"
    assert read["loader"] == "megatron_pmd.weight_sync.loader"


def test_our_plugin_is_loaded_by_sglang_and_asks_for_the_experts(engine):
    assert engine[1]["plugin"]["asked"] is True and engine[1]["plugin"]["hooked"] is True


def test_every_compiler_of_kernels_keeps_them_where_the_job_says(engine):
    environment, found = engine
    read = found["caches"]
    wrong = {
        name: read[name]
        for name in FOLDERS
        if name not in READ_IN_COMPILING and not read[name].startswith(environment[name])
    }
    assert wrong == {}


def test_blocks_have_scales_that_are_no_powers_of_two_where_the_recipe_is_blockwise(tmp_path):
    plain = run("rank_process", tmp_path / "plain.json")
    blockwise = run("rank_process", tmp_path / "blockwise.json", "actor.fp8.recipe=blockwise")
    assert plain["power of two"] is True and blockwise["power of two"] is False


@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_TIMEOUT"])
def test_nccl_knows_the_variables_that_a_job_sets(variable):
    package: Any = find_spec("nvidia.nccl")
    (folder,) = package.submodule_search_locations
    with (Path(folder) / "lib/libnccl.so.2").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert library.find(b"\0" + variable.encode() + b"\0") >= 0


CHILD = """
import ctypes
address = ctypes.cast(ctypes.CDLL(None).cudaMalloc, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    if start <= address < end:
        print(line.split()[-1])
"""


def test_the_memory_saver_takes_cudas_allocations_in_the_processes_that_sglang_starts():
    with TorchMemorySaverAdapter.create(enable=True).configure_subprocess():
        preloaded = Path(os.environ["LD_PRELOAD"].split(os.pathsep)[0])
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.strip() == str(preloaded)
    saver = ctypes.CDLL(str(preloaded))
    for call in ("tms_set_current_tag", "tms_set_interesting_region", "tms_pause", "tms_resume"):
        assert hasattr(saver, call)
