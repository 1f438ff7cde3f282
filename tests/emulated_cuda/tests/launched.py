"""A program of this folder as several processes, one device each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def launch(program: str, *words: str, ranks: int) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["EMULATED_CUDA_DEVICES"] = str(ranks)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"{__package__}.{program}", *words],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
