"""Which extra a command needs, said in one line where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from megatron_pmd.errors import MissingPackage

INSTALL = {
    "report": "pip install 'megatron-pmd[report]'",
    "cpu": "`make setup` in a clone installs what trains on a CPU, the Dockerfile what trains on GPUs",
}


@contextmanager
def needs(extra: Literal["report", "cpu"]) -> Iterator[None]:
    """Around a command's imports. Raises MissingPackage, with how to install the extra, for a missing one."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("megatron_pmd", "recipes"):
            raise
        raise MissingPackage(
            f"this command needs {error.name}, which is not installed: {INSTALL[extra]}"
        ) from None
