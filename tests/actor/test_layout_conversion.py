"""The checkpoint of a run under any layout becomes, in one process, what its ranks export together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.actor.conftest import LAYOUTS
from tests.actor.launch import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(trained, models, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("hf")
    cases = {
        name: (trained(name)[0]["checkpoint"], models / family, folder / name)
        for name, (family, _) in LAYOUTS.items()
    }
    return folder, launch("to_hf", module="tests.convert.conversion_programs", cases=cases)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_converting_without_the_ranks_gives_the_tensors_they_export(converted, trained, name):
    folder, manifests = converted
    exported = trained(name)[0]["weights"]
    found = {k: v for file in (folder / name).glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in exported.items())
    for key, size in LAYOUTS[name][1].items():
        if key != "data":
            assert manifests[name]["layout"][key] == size
