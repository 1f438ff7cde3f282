"""Which tests stay together on one of pytest-xdist's workers, and which run only when they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

# a busy machine is no failure
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

TOGETHER = ("actor", "convert", "end_to_end")
"""Folders whose files share what a session prepares: layouts trained, models converted, runs with engines."""
WITH_CUDA_PACKAGES = [
    Path(__file__).parent / name for name in ("gpu_contract", "emulated_cuda", "gpu_emulated")
]
"""They make torch believe in a GPU: an environment and processes of their own."""
RUN_BY_NAME = [*WITH_CUDA_PACKAGES, Path(__file__).parent / "engine" / "test_every_family.py"]
"""The last starts an engine a family: minutes."""


BEGUN_FIRST = (
    "slurm", "actor", "end_to_end", "weight_sync/test_faults.py", "test_tutorials.py", "convert",
    "weight_sync/test_two_engines.py",
)  # fmt: skip
"""What takes minutes: begun last, it would leave the other workers idle."""


class ByFile(LoadScopeScheduling):
    """A file stays whole, for its module's engine or cluster; a folder of TOGETHER does.

    `--dist loadgroup` would ask for marks only, but of pytest-xdist 3.8.0 it does nothing under pytest 9.2:
    xdist/remote.py appends the group to Item._nodeid, which pytest no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        folder = path.split("/")[1]
        return folder if folder in TOGETHER else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFile(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these out unless one is asked for by its path, as `make gpu-contract` does."""
    if collection_path not in RUN_BY_NAME:
        return None
    named = [(config.invocation_params.dir / word.partition("::")[0]).resolve() for word in config.args]
    asked = any(path == collection_path or collection_path in path.parents for path in named)
    return None if asked else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which workers take them."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        return next(
            (i for i, name in enumerate(BEGUN_FIRST) if item.path.is_relative_to(here / name)),
            len(BEGUN_FIRST),
        )

    items.sort(key=place)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for is told after 50 ms in the place of ten seconds."""
    from megatron_pmd import waiting

    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "LOOKS_APART_SECONDS", 0.02)
    waiting._HERE.begin_anew()  # a thread that still looks every second would come too late
