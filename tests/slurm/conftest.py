from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import LIVE, NEMO_PYTHON, PROJECT, Cluster

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "gcc")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The lab, up for the tests of this folder. CI has everything it needs, and fails where it does not."""
    missing = [
        program for program in NEEDED if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if os.geteuid() != 0:
        missing.append("root")
    if missing and not os.environ.get("CI"):
        pytest.skip(f"a Slurm on this machine needs {', '.join(missing)}: see slurm/lab")
    assert not missing, f"not here: {', '.join(missing)}"
    lab = Cluster(tmp_path_factory.mktemp("slurm"))
    plugin = lab.folder / "pyxis_standin.so"
    source = PROJECT / "slurm" / "spank" / "pyxis_standin.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", plugin, source], check=True, timeout=60)
    lab.lab("up", "--nodes", "3", "--plugin", str(plugin))
    try:
        yield lab
    finally:
        lab.lab("down")


@pytest.fixture(scope="session")
def live(cluster: Cluster) -> str:
    """A complete run on two nodes with one live engine over both; the other runs train on its rollouts."""
    number = cluster.launch("live", cluster.profile(), *LIVE)
    assert cluster.wait_for_end(number, "live") == "COMPLETED", cluster.log("live")
    return number


@pytest.fixture(scope="session")
def nemo_python() -> Path:
    """Python of the environment that nemo-run has to itself: it asks for other versions than the engines."""
    if not NEMO_PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("no .venv-nemo: make nemo")
    assert NEMO_PYTHON.exists(), "no .venv-nemo: make nemo"
    return NEMO_PYTHON
