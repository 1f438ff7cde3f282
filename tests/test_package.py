"""The wheel, installed in an environment that holds nothing else, and used from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_pmd import __version__
from recipes import RECIPES
from tests.observe.conftest import make_run

pytestmark = pytest.mark.slow

FIXTURES = (make_run,)
PROJECT = Path(__file__).parents[1]
SOURCES = ("megatron_pmd", "recipes", "slurm")
DEADLINE_SECONDS = 300


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "COLUMNS": "200"},
        capture_output=True, text=True, timeout=DEADLINE_SECONDS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(
            PROJECT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def pip(*words: str) -> None:
    """This environment's pip, without PYTHONPATH: it would take what it finds there as installed."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def install(python: Path, what: str) -> None:
    pip("--python", str(python), "install", "-c", str(PROJECT / "constraints/stack.txt"), what)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel and the core dependencies alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    install(folder / "bin/python", str(wheel))
    return folder / "bin/python"


@pytest.fixture
def command(python: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`megatron-pmd`, in an empty folder."""
    return lambda *words: run(python.with_name("megatron-pmd"), *words, folder=tmp_path)


def test_the_wheel_holds_recipes_templates_known_models_and_slurm_files(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        *(f"recipes/{target.partition(':')[0].rpartition('.')[2]}.py" for target in RECIPES.values()),
        *(
            f"megatron_pmd/launch/{path.relative_to(PROJECT)}"
            for path in [PROJECT / "slurm/train.sbatch", *(PROJECT / "slurm/clusters").glob("*.toml")]
        ),
        *(
            str(path.relative_to(PROJECT))
            for path in (PROJECT / "megatron_pmd").rglob("*")
            if path.suffix in (".py", ".j2", ".json") and "__pycache__" not in path.parts
        ),
    }
    assert expected - names == set()
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_it_tells_its_version(command):
    assert command("--version").stdout == f"megatron-pmd {__version__}\n"
    assert f"version: {__version__}" in (PROJECT / "CITATION.cff").read_text()


def test_it_plans_and_writes_the_batch_script_from_an_empty_folder(command):
    plan = command("plan", "qwen3_30b_a3b_dapo_32xh100")
    assert plan.returncode == 0, plan.stderr
    launch = command("launch", "qwen3_30b_a3b_dapo_32xh100", "--cluster", "h100", "--dry-run")
    assert launch.returncode == 0, launch.stderr
    golden = PROJECT / "tests/launch/golden/qwen3_30b_a3b_dapo_32xh100.h100.sbatch"
    assert golden.read_text() in launch.stdout
    body = (PROJECT / "slurm/train.sbatch").read_text().partition("# --- from here on")[2]
    assert launch.stdout.rstrip().endswith(body.rstrip())


def test_what_needs_more_packages_names_the_one_and_how_to_install_it(command):
    report = command("report", "runs/x")
    assert report.returncode != 0
    assert "needs jinja2, which is not installed: pip install 'megatron-pmd[report]'" in report.stderr
    train = command("train", "tiny_moe_cpu")
    assert train.returncode != 0 and "Traceback" not in train.stderr
    assert "which is not installed: `make setup`" in train.stderr


def test_with_its_extra_it_reports_a_run(wheel: Path, python: Path, command, make_run):
    """Last: from here on the environment is not empty."""
    folder = make_run()
    install(python, f"{wheel}[report]")
    done = command("report", "runs/synthetic")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/synthetic/report.html\n"
    assert "<h1>synthetic" in (folder / "report.html").read_text()
