"""Cluster profiles: what is accepted, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.errors import ConfigError
from megatron_pmd.launch.cluster import PROFILES, load_cluster

MINIMAL = """
gpus_per_node = 8
gpu = "h100"
host_memory_gigabytes = 1000
cpus_per_node = 64
time = "01:00:00"
shared = "/shared"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_worked_examples_are_valid(path: Path) -> None:
    assert load_cluster(path.stem).name == path.stem


def test_a_profile_needs_little(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, MINIMAL))
    assert (cluster.name, cluster.time_seconds, cluster.container.runtime) == ("mine", 3600, "none")
    assert cluster.machines.host_memory_bytes == 10**12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('acount = "a"', r"mine.toml: acount is not a setting \(did you mean account\?\)"),
        ('[network]\nsocket_interface = ["ib0"]', r"did you mean network.socket_interfaces\?"),
        (
            '[container]\nruntime = "docker"',
            "container.runtime: Input should be 'pyxis', 'apptainer' or 'none'",
        ),
        ('[container]\nruntime = "pyxis"', "container.runtime=pyxis needs container.image"),
        ('[container]\nimage = "a.sqsh"', "need container.runtime=pyxis or apptainer"),
        ("[environment]\nnccl_debug = 'INFO'", "environment.nccl_debug: String should match pattern"),
        ("signal_seconds = 60", "Slurm's clock is coarse"),
        ("signal_seconds = 3600", "signal_seconds=3600 is not within time=01:00:00"),
        ("gpus_per_node = ", "not TOML"),
    ],
)
def test_a_wrong_profile_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(written(tmp_path, MINIMAL + text))


def test_an_unknown_profile_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"there are: h100, lab, or give a \.toml file"):
        load_cluster("h1000")


def test_days_count_in_a_walltime(tmp_path: Path) -> None:
    text = MINIMAL.replace("01:00:00", "1-02:00:30")
    assert load_cluster(written(tmp_path, text)).time_seconds == 26 * 3600 + 30
