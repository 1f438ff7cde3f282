"""Where compiled kernels are kept, in the words of the libraries that compile them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from megatron_pmd.engine.installed_options import sglang_source
from megatron_pmd.errors import LaunchError
from megatron_pmd.node.caches import FOLDERS, keep_compiled_kernels

PACKAGES = {"torch": "2.14.1", "sglang": "0.5.23", "megatron-pmd": "1"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*FOLDERS, "PMD_SCRATCH", "SLURM_JOB_USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set here ends with the test
    os.environ["PMD_RUNS"] = str(tmp_path / "runs")


def environment_of_sglang() -> ModuleType:
    """Its table of environment variables, without the rest of it, which takes seconds to import."""
    spec = importlib.util.spec_from_file_location("environ_of_sglang", sglang_source() / "environ.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cache_that_sglang_knows_of_is_in_the_folder_that_stays() -> None:
    folder = keep_compiled_kernels("n1", PACKAGES)
    sglang = environment_of_sglang()
    assert set(sglang.third_party_cache_defaults()) <= set(FOLDERS)
    own = [name for name in vars(type(sglang.envs)) if name.endswith("_CACHE_DIR")]
    assert {"SGLANG_CACHE_DIR", "SGLANG_DG_CACHE_DIR", "SGLANG_JIT_CACHE_DIR"} <= set(own)
    for name in own:
        assert Path(getattr(sglang.envs, name).get()).is_relative_to(folder), name


def test_the_caches_of_a_node_are_of_one_user_and_one_set_of_versions(tmp_path: Path) -> None:
    os.environ["SLURM_JOB_USER"] = "ada"
    shared = keep_compiled_kernels("n1", PACKAGES)
    assert shared.parent == tmp_path / "runs" / ".megatron-pmd-ada" / "n1"
    assert shared.name.startswith("sglang-0.5.23-torch-2.14.1-")
    assert shared.parent.parent.stat().st_mode & 0o777 == 0o700
    os.environ["PMD_SCRATCH"] = str(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    assert keep_compiled_kernels("n1", PACKAGES).parent == tmp_path / "disk" / "megatron-pmd-ada"
    again = keep_compiled_kernels("n1", PACKAGES | {"megatron-pmd": "2"}).name
    assert again == shared.name, "ours compiles nothing"
    assert keep_compiled_kernels("n1", PACKAGES | {"sglang-kernel": "0.4.6"}).name != shared.name


def test_a_cache_that_the_profile_names_stays_where_it_is(tmp_path: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = "/elsewhere"
    folder = keep_compiled_kernels("n1", PACKAGES)
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(folder / "flashinfer")


def test_a_folder_that_cannot_be_made_or_is_anothers_is_a_problem_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in it is loaded and run."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LaunchError, match="cannot keep compiled kernels there: Not a directory"):
        keep_compiled_kernels("n1", PACKAGES)
    (tmp_path / "runs").unlink()
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(LaunchError, match=r"megatron-pmd-4711, .* belongs to another user"):
        keep_compiled_kernels("n1", PACKAGES)
