"""tools/find_python, which `make setup` asks for a Python 3.12."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "find_python"
TOOLS = "/usr/bin:/bin"


@pytest.fixture
def find(tmp_path: Path):
    """Run it where no Python of this user is in sight. programs: what a script of each name on PATH does."""

    def run(programs: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, commands in programs.items():
            (folder / name).write_text(f"#!/bin/sh\n{commands}\n")
            (folder / name).chmod(0o755)
        whole = {"HOME": str(tmp_path), "PATH": f"{folder}:{TOOLS}"} | environment
        return subprocess.run([PROGRAM], env=whole, capture_output=True, text=True, timeout=60)

    return run


REAL = f'exec {sys.executable} "$@"'
OTHER_VERSION = "exit 1"  # what the question ends with under a Python 3.11
BROKEN = "echo 'pyenv: python3.12: command not found' >&2; exit 127"


def test_a_shim_that_does_not_run_is_passed_over_for_a_python_that_does(find, tmp_path):
    found = find({"python3.12": BROKEN, "python3": REAL})
    assert (found.returncode, found.stdout.strip()) == (0, str(tmp_path / "bin" / "python3"))


def test_pyenvs_versions_are_looked_into(find, tmp_path):
    python = tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3.12"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{REAL}\n")
    python.chmod(0o755)
    found = find({"python3.12": BROKEN, "python3": OTHER_VERSION})
    assert found.stdout.strip() == str(python)


def test_uv_is_asked_and_downloads_one_where_it_has_none(find, tmp_path):
    uv = f"""
case "$2" in
    install) touch {tmp_path}/installed ;;
    find) [ -e {tmp_path}/installed ] && echo {sys.executable} ;;
esac"""
    found = find({"python3.12": BROKEN, "python3": OTHER_VERSION, "uv": uv})
    assert found.stdout.strip() == sys.executable


def test_a_python_asked_for_by_name_is_not_replaced_by_another(find):
    found = find({"python3.12": REAL, "python3.11": OTHER_VERSION}, PYTHON="python3.11")
    assert found.returncode == 1 and found.stdout == ""
    assert "PYTHON=python3.11 is no Python 3.12 that can make environments" in found.stderr


def test_where_there_is_none_the_message_says_how_to_get_one(find):
    found = find({"python3.12": BROKEN, "python3": OTHER_VERSION})
    assert found.returncode == 1 and found.stdout == ""
    for way in ("apt-get install python3.12", "pip install uv", "pyenv install 3.12", "make setup PYTHON="):
        assert way in found.stderr
