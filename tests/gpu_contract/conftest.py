"""What every file of the contract takes for granted: the real CUDA packages, and no device.

`make gpu-contract` runs these files in an environment of their own (tools/gpu_environment).
"""

from __future__ import annotations

import os
import resource
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

GIGABYTE = 2**30
ADDRESS_SPACE_GIGABYTES = 48
"""CUDA's libraries alone take 10: more than all of this means that weights were made, not described."""

resource.setrlimit(
    resource.RLIMIT_AS, (ADDRESS_SPACE_GIGABYTES * GIGABYTE, resource.getrlimit(resource.RLIMIT_AS)[1])
)
os.environ["HF_HUB_OFFLINE"] = "1"
# else a config.json's missing keys are looked for in a cache of the user's
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

LEFT_OUT = {
    "fused_weight_gradient_mlp_cuda": "of NVIDIA's apex, which no index has; the Dockerfile compiles it"
}
"""Module -> why the environment of `make gpu-contract` has none; the image has it."""

try:
    metadata.version("transformer-engine-torch")
except metadata.PackageNotFoundError:
    raise pytest.UsageError(
        "tests/gpu_contract needs the CUDA packages that a GPU needs: run it with `make gpu-contract`"
    ) from None

from tests.gpu_contract.pretended_device import NVIDIA_SMI, pretend  # noqa: E402

pretend()


def pytest_report_header() -> list[str]:
    return [f"left out: {module} ({why})" for module, why in LEFT_OUT.items() if find_spec(module) is None]


@pytest.fixture(scope="session", autouse=True)
def nvidia_smi(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = tmp_path_factory.mktemp("bin") / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes' model folders are made."""
    return tmp_path_factory.mktemp("models")
