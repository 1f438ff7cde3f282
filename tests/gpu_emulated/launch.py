"""Starts programs on ranks that have an emulated device each, and collects what each rank returns."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.config import RunConfig
from tests.emulated_cuda.tests.launched import free_port

DEADLINE_SECONDS = 900


def launch(program: str, configs: Sequence[RunConfig], *, ranks: int = 1, **arguments: Any) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)`, from programs.py or as `module.function`.

    configs: each sets what it wants of the ranks' environment, as the first thing that a worker does. Fails
    with the end of the ranks' output when one of them fails.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order"
        order.write_bytes(pickle.dumps((program, configs, arguments)))
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        place |= {
            "MASTER_PORT": str(free_port()),
            "EMULATED_CUDA_DEVICES": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_emulated.launch", str(order)]
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        running = []
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(command, env=os.environ | place | own, stdout=file, stderr=file)
                )
        try:
            codes = [process.wait(DEADLINE_SECONDS) for process in running]
        finally:
            for process in running:
                process.kill()
        failed = [f"rank {r}: {code}:\n{logs[r].read_text()[-4000:]}" for r, code in enumerate(codes) if code]
        if failed:
            raise AssertionError(f"{program} on {ranks} ranks:\n" + "\n".join(failed))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_order(order: Path) -> None:
    """What each rank does for launch()."""
    from megatron_pmd.actor.environment import set_environment

    torch.set_num_threads(1)
    name, configs, arguments = pickle.loads(order.read_bytes())
    for config in configs:
        set_environment(config)
    module, _, function = name.rpartition(".")
    programs = importlib.import_module(f"tests.gpu_emulated.{module or 'programs'}")
    value = getattr(programs, function)(**arguments)
    torch.save(value, order.parent / f"{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_order(Path(sys.argv[1]))
