"""A process that stands for an engine's rank: loads what it is told of into a model that keeps it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.errors import EngineError
from megatron_pmd.weight_sync.bucket import Bucket
from megatron_pmd.weight_sync.transport import ReadBy


class Keeps(torch.nn.Module):
    """Takes every tensor that comes, in its own memory on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        assert all(tensor.device.index == torch.cuda.current_device() for _, tensor in weights)
        self.tensors |= {name: tensor.clone() for name, tensor in weights}


def main(device: int) -> None:
    """Orders by line on stdin, an answer by line on stdout."""
    from megatron_pmd.weight_sync import loader

    torch.cuda.set_device(device)
    model = Keeps()
    for line in sys.stdin:
        order = json.loads(line)
        if "keep" in order:
            torch.save({name: tensor.cpu() for name, tensor in model.tensors.items()}, order["keep"])
            model = Keeps()
            torch.cuda.empty_cache()
        else:
            text = bytearray(json.dumps(order["load"]).encode())
            loader.load_bucket(model, [("bucket", torch.frombuffer(text, dtype=torch.uint8))])
        if order.get("dies"):
            signal.raise_signal(signal.SIGKILL)
        print("done", flush=True)


class EngineProcesses:
    """A transport into such processes, one for each rank of the engine that this rank leads."""

    read_by: ReadBy = "engines"

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = devices
        self._ranks: list[subprocess.Popen[str]] = []
        self.descriptions: list[list[dict[str, Any]]] = []
        """By bucket, what each rank was told of it."""
        self.changes_byte_of = self.dies_at = -1
        """Numbers of buckets: one whose first byte changes before the engine reads it; one after which the
        engine's first rank is killed, before it answers."""

    def begin(self) -> None:
        self.descriptions = []
        if not self._ranks or any(rank.poll() is not None for rank in self._ranks):
            self._kill()
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "tests.gpu_emulated.engine", str(device)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
                for device in self._devices
            ]  # fmt: skip

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        number = len(self.descriptions)
        self.descriptions.append(list(descriptions))
        if number == self.changes_byte_of:
            assert bucket is not None
            bucket.data[:1].bitwise_not_()
        with tempfile.TemporaryDirectory() as folder:
            replies = [Path(folder) / str(rank) for rank in range(len(self._ranks))]
            told = [
                {"load": description | {"reply": str(reply)}, "dies": number == self.dies_at and rank == 0}
                for rank, (description, reply) in enumerate(zip(descriptions, replies, strict=True))
            ]
            self._answered(told)
            for rank, reply in enumerate(replies):
                for failure in json.loads(reply.read_text())["failures"]:
                    if failure:
                        raise EngineError(f"rank {rank} refused the weights: {failure}")

    def end(self, version: int) -> None: ...

    def keep(self) -> list[dict[str, torch.Tensor]]:
        """By rank of the engine, what it has been given; it forgets that."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / str(rank) for rank in range(len(self._ranks))]
            self._answered([{"keep": str(file)} for file in files])
            return [torch.load(file) for file in files]

    def close(self) -> None:
        self._kill()

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._ranks = []

    def _answered(self, orders: Sequence[dict[str, Any]]) -> None:
        for rank, order in zip(self._ranks, orders, strict=True):
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(order) + "\n")
            rank.stdin.flush()
        for number, rank in enumerate(self._ranks):
            assert rank.stdout is not None
            if rank.stdout.readline() != "done\n":
                raise EngineError(f"rank {number} of the engine ended with {rank.wait()}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
