"""Starting programs on actor ranks and collecting what each rank returns."""

from __future__ import annotations

import importlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.actor.warm import REPOSITORY, WARM, Job, WarmProcess

DEADLINE_SECONDS = 600


def launch(
    program: str, *, ranks: int = 1, module: str = "tests.actor.actor_programs", **arguments: Any
) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)` of the module.

    Fails with the end of their output when one of them fails.
    """
    __tracebackhide__ = True
    return launch_from(WARM, "tests.actor.launch:run_order", module, program, arguments, ranks)


def launch_from(
    warm: WarmProcess,
    function: str,
    module: str,
    program: str,
    arguments: dict[str, Any],
    ranks: int,
    environment: dict[str, str] | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> list[Any]:
    """launch from another warm process, on each of whose ranks `function` does what run_order does here."""
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        order, log = Path(folder) / "order", Path(folder) / "log"
        order.write_bytes(pickle.dumps((program, arguments)))
        job = Job(
            function, (module, str(order)), str(REPOSITORY), str(log), str(log), ranks, environment or {},
            deadline_seconds,
        )  # fmt: skip
        code = warm.run(job)
        if code != 0:
            said = log.read_text()[-6000:]
            raise AssertionError(f"{program} on {ranks} ranks ended with {code}:\n{said}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_order(module: str, order: str) -> None:
    """What each rank does for launch(): run the program asked for, keep its value.

    A module whose programs need something around them has a function `run(program, arguments)`.
    """
    torch.set_num_threads(1)
    programs = importlib.import_module(module)
    name, arguments = pickle.loads(Path(order).read_bytes())
    program = getattr(programs, name)
    value = programs.run(program, arguments) if hasattr(programs, "run") else program(**arguments)
    torch.save(value, Path(order).parent / f"{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
