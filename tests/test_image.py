"""The Dockerfile's own arithmetic of versions: its lines, run on files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_pmd import doctor

ROOT = Path(__file__).parents[1]
STEPS = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


@pytest.fixture
def build(tmp_path: Path):
    """`build(beginning, PINS)`: the first command of the RUN line that begins so, beside constraints/."""
    (tmp_path / "opt").mkdir()

    def run(beginning: str, pins: str = "") -> subprocess.CompletedProcess[str]:
        (step,) = (line for line in STEPS.splitlines() if line.startswith(f"RUN {beginning}"))
        command = step.removeprefix("RUN ").partition(" && ")[0].replace("/opt/", f"{tmp_path}/opt/")
        whole = os.environ | {"PINS": pins}
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=whole, capture_output=True, text=True
        )

    copy_constraints(tmp_path)
    return run


def copy_constraints(project: Path) -> None:
    """What both COPY lines bring of constraints/."""
    shutil.copytree(ROOT / "constraints", project / "constraints", dirs_exist_ok=True)


def test_the_contract_and_the_doctor_of_an_image_with_pins_know_these_pins(build, tmp_path, monkeypatch):
    assert build("for pin in", "httpx==0.99.0 leptonai==9.9").returncode == 0
    copy_constraints(tmp_path)
    assert build("cp /opt").returncode == 0
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert (doctor.pins("stack")["httpx"], doctor.pins("nemo")["leptonai"]) == ("0.99.0", "9.9")
    assert doctor.pins("stack").keys() >= {"torch", "sglang"}


def test_a_pin_of_a_package_that_is_not_ours_stops_the_build_and_is_named(build):
    refused = build("for pin in", "nothing==1")
    assert refused.returncode == 1 and "PINS: nothing is no pin of ours" in refused.stderr
