"""A program of this folder as several processes, one device each."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

PORTS = range(20_000, 30_000)
"""Below those that the kernel gives to outgoing connections: it gives none away meanwhile."""


def free_port() -> int:
    """One that nobody listens at, for rank 0's store."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def launch(program: str, *words: str, ranks: int) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place["EMULATED_CUDA_DEVICES"] = str(ranks)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"{__package__}.{program}", *words],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
