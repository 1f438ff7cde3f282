"""Starting programs on actor ranks and collecting what each rank returns."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.actor.warm import REPOSITORY, WARM, Job

DEADLINE_SECONDS = 600


def launch(
    program: str, *, ranks: int = 1, module: str = "tests.actor.actor_programs", **arguments: Any
) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)` of the module.

    Fails with the end of their output when one of them fails.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        order, log = Path(folder) / "order", Path(folder) / "log"
        order.write_bytes(pickle.dumps((program, arguments)))
        job = Job(
            module, (str(order),), str(REPOSITORY), str(log), str(log), ranks,
            deadline_seconds=DEADLINE_SECONDS,
        )  # fmt: skip
        code = WARM.run(job)
        if code != 0:
            said = log.read_text()[-6000:]
            raise AssertionError(f"{program} on {ranks} ranks ended with {code}:\n{said}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_program(programs: Mapping[str, Any]) -> None:
    """What a module of programs does when launch() starts it: run the one asked for, keep its value."""
    torch.set_num_threads(1)
    order = Path(sys.argv[1])
    name, arguments = pickle.loads(order.read_bytes())
    torch.save(programs[name](**arguments), order.parent / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
