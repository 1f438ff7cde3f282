"""A server that takes weights over the network as SGLang does, and has no model: for many deaths in a test.

That SGLang takes them so is shown with SGLang itself, in test_engine_updates.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

FORK = multiprocessing.get_context("fork")


def digest(tensor: torch.Tensor) -> str:
    """Of all bits."""
    return hashlib.blake2b(
        tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16
    ).hexdigest()


class Life:
    """One life of a server on a port of loopback. Made before this process has threads, begun later."""

    def __init__(self) -> None:
        self._begins, self._port = FORK.Event(), FORK.Value("i", 0)
        self._process = FORK.Process(target=self._live, args=(os.getpid(),), daemon=True)
        self._process.start()

    def begin(self, port: int) -> None:
        self._port.value = port
        self._begins.set()

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _live(self, parent: int) -> None:
        while not self._begins.wait(0.5):
            if os.getppid() != parent:
                return
        _Server(self._port.value).serve_forever()


class _Server(ThreadingHTTPServer):
    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.version, self.paused = "default", False
        self.weights: dict[str, torch.Tensor] = {}
        self.groups: dict[str, Any] = {}
        self.buckets = self.dies_at = self.received = 0
        self.scheduler = threading.Lock()
        """Held while it does what it is asked: an engine that waits for a message answers nothing else."""
        self.waits_for_ever = False

    def join(self, order: dict[str, Any]) -> None:
        """As sglang.srt.utils.common.init_custom_process_group."""
        deadline = timedelta(seconds=30)
        store = dist.TCPStore(
            order["master_address"], order["master_port"], is_master=False, timeout=deadline
        )
        name, world, rank = order["group_name"], order["world_size"], order["rank_offset"]
        group, _ = _new_process_group_helper(
            world, rank, [], Backend(order["backend"]), PrefixStore(name, store),
            group_name=GroupName(name), timeout=deadline,
        )  # fmt: skip
        _world.pg_group_ranks[group] = {number: number for number in range(world)}
        self.groups[name] = group

    def take(self, order: dict[str, Any]) -> None:
        """As WeightUpdater._receive_bucketed_weights_from_distributed."""
        self.buckets += 1
        if self.buckets == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        assert order["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, name) for name in order["dtypes"]]
        empty = [torch.empty(shape, dtype=d) for shape, d in zip(order["shapes"], dtypes, strict=True)]
        message = torch.empty(sum(tensor.nbytes for tensor in empty), dtype=torch.uint8)
        try:
            dist.broadcast(message, 0, group=self.groups[order["group_name"]])
        except RuntimeError:  # gloo says that the one it waited for is gone; NCCL does not
            if self.waits_for_ever:
                threading.Event().wait()
            raise
        self.received += message.nbytes
        parts = message.split([tensor.nbytes for tensor in empty])
        for name, tensor, part in zip(order["names"], empty, parts, strict=True):
            self.weights[name] = part.view(tensor.dtype).view(tensor.shape)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/server_info":
            with self.server.scheduler:
                self._answer({"tp_size": 1})
            return
        digests = {name: digest(tensor) for name, tensor in self.server.weights.items()}
        answers: dict[str, dict[str, Any]] = {
            "/model_info": {"weight_version": self.server.version},
            "/state": {
                "paused": self.server.paused,
                "buckets": self.server.buckets,
                "digests": digests,
                "received": self.server.received,
            },
        }
        self._answer(answers.get(self.path, {}))

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        with self.server.scheduler:
            success = self._done(order)
        self._answer({"success": success})

    def _done(self, order: dict[str, Any]) -> bool:
        """Whether it could be done."""
        match self.path.partition("?")[0]:
            case "/update_weight_version":
                self.server.version = order["new_version"]
            case "/begin_weight_update":
                self.server.weights = {}
            case "/pause_generation" | "/continue_generation":
                self.server.paused = self.path == "/pause_generation"
            case "/init_weights_update_group":
                self.server.join(order)
            case "/destroy_weights_update_group":
                return self.server.groups.pop(order["group_name"], None) is not None
            case "/update_weights_from_distributed":
                self.server.take(order)
            case "/die_at":
                self.server.dies_at = self.server.buckets + order["bucket"]
            case "/wait_for_ever":
                self.server.waits_for_ever = True
        return True

    def _answer(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...
