"""Starts programs on ranks that have an emulated device each, and collects what each rank returns."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig
from tests.actor import launch as of_the_actor
from tests.actor.warm import WarmProcess

WARM = WarmProcess("tests.gpu_emulated.warm")
DEADLINE_SECONDS = 900.0


def launch(
    program: str, *, ranks: int = 1, environment: dict[str, str] | None = None, **arguments: Any
) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)`, from programs.py or as `module.function`.

    Each configuration in the arguments sets what it wants of the ranks' environment first, as in a worker.
    Fails with the end of the ranks' output when one of them fails.
    """
    __tracebackhide__ = True
    module, _, function = program.rpartition(".")
    return of_the_actor.launch_from(
        WARM, "tests.gpu_emulated.launch:run_order", f"tests.gpu_emulated.{module or 'programs'}", function,
        arguments, ranks, environment, DEADLINE_SECONDS,
    )  # fmt: skip


def run_order(module: str, order: str) -> None:
    """What each rank does for launch()."""
    from megatron_pmd.actor.environment import prepare_imports

    _, arguments = pickle.loads(Path(order).read_bytes())
    for configuration in _configurations(arguments):
        prepare_imports(configuration)
    of_the_actor.run_order(module, order)


def _configurations(value: Any) -> Iterator[RunConfig]:
    if isinstance(value, RunConfig):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _configurations(each)
