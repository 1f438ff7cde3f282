"""Starting programs on actor ranks and collecting what each rank returns."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
DEADLINE_SECONDS = 600
SINGLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The environment of one rank without torchrun: it takes whatever port is free."""


def launch(
    program: str, *, ranks: int = 1, module: str = "tests.actor.actor_programs", **arguments: Any
) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)` of the module; torchrun starts several ranks.

    Fails with the end of their output when one of them fails.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order"
        order.write_bytes(pickle.dumps((program, arguments)))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *(torchrun if ranks > 1 else []), module, str(order)],
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (SINGLE if ranks == 1 else {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                process.wait(30)
                code = -1
            if code != 0:
                log.seek(0)
                raise AssertionError(f"{program} on {ranks} ranks ended with {code}:\n{log.read()[-6000:]}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_program(programs: Mapping[str, Any]) -> None:
    """What a module of programs does when launch() starts it: run the one asked for, keep its value."""
    torch.set_num_threads(1)
    order = Path(sys.argv[1])
    name, arguments = pickle.loads(order.read_bytes())
    torch.save(programs[name](**arguments), order.parent / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
