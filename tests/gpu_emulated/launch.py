"""Starts programs on ranks that have an emulated device each, and collects what each rank returns."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.config import RunConfig
from tests.actor.launch import run_order
from tests.emulated_cuda.tests.launched import free_port

DEADLINE_SECONDS = 900


def launch(program: str, *, ranks: int = 1, **arguments: Any) -> list[Any]:
    """Every rank's return value of `<program>(**arguments)`, from programs.py or as `module.function`.

    Each configuration in the arguments sets what it wants of the ranks' environment first, as in a worker.
    Fails with the end of the ranks' output when one of them fails.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        module, _, function = program.rpartition(".")
        order, configurations = Path(folder) / "order", Path(folder) / "configurations"
        order.write_bytes(pickle.dumps((function, arguments)))
        configurations.write_bytes(pickle.dumps(list(_configurations(arguments))))
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        place |= {
            "MASTER_PORT": str(free_port()),
            "EMULATED_CUDA_DEVICES": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_emulated.launch"]
        command += [f"tests.gpu_emulated.{module or 'programs'}", str(order), str(configurations)]
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


def _configurations(value: Any) -> Iterator[RunConfig]:
    if isinstance(value, RunConfig):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _configurations(each)


if __name__ == "__main__":
    from megatron_pmd.actor.environment import prepare_imports

    for configuration in pickle.loads(Path(sys.argv[3]).read_bytes()):
        prepare_imports(configuration)
    run_order(*sys.argv[1:3])
