"""Four ranks on two nodes, each node with a model in halves, and two servers: see tests/actor/launch.py."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import torch.distributed as dist

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import Rollout, Sync
from megatron_pmd.distributed import Control
from megatron_pmd.engine.server import answers
from megatron_pmd.training.separate_engines import SeparateEngines
from tests.actor.tiny_models import config_for
from tests.weight_sync.weights_server import Life, digest


class WithoutSampler(SeparateEngines):
    """The process that samples, and the router, have tests of their own."""

    def _started(self) -> Any: ...

    def _asked(self, ask: Any) -> Any: ...


class Trial:
    def __init__(self, path: Path, folder: Path, ports: list[int]) -> None:
        config = config_for(path, dict(tensor=2, data=2)).model_copy(
            update={
                "rollout": Rollout(
                    servers=tuple(f"http://127.0.0.1:{port}" for port in ports),
                    placement="separate", start_timeout_seconds=20, restarts=2,
                ),
                "sync": Sync(timeout_seconds=30, transport="broadcast"),
            }
        )  # fmt: skip
        initialize(config.layout, seed=0, timeout_seconds=60)
        self.control = Control(120)
        self.control.node = self.control.rank // 2
        self.said: list[str] = []
        console: Any = SimpleNamespace(say=self.said.append)
        self.engines = WithoutSampler(config, self.control, folder, None, None, console, cpu=True, ahead=None)
        self.routed: list[list[str]] = []
        self.engines.router = SimpleNamespace(  # type: ignore[assignment]
            start=self.routed.append, stop=lambda: None, url=""
        )
        self.actor = Actor(config, self.control)
        self.version = self.sent = 0
        broadcast = dist.broadcast

        def counted(message: torch.Tensor, source: int, *, group: Any, **options: Any) -> Any:
            self.sent += message.nbytes * (group.rank() == source)
            return broadcast(message, source, group=group, **options)

        dist.broadcast = counted  # type: ignore[assignment]

    def update(self) -> dict[str, Any]:
        """Other weights; what is said, what the servers then have, and Megatron-Bridge's own export."""
        self.version += 1
        with torch.no_grad():
            for parameter in self.actor.chunks[0].parameters():
                parameter.mul_(1.25)
        said, self.sent = len(self.said), 0
        report = self.engines.load(self.actor, self.version)
        exported = {name: digest(tensor.detach()) for name, tensor in self.actor.export()}
        urls = list(self.engines.fleet.urls)
        states = self.control.on_driver(lambda: [_state(url) for url in urls])
        return {
            "said": self.said[said:], "exported": exported, "urls": urls, "servers": states,
            "buckets": report.buckets, "bytes": report.bytes, "sent": self.control.all_gather(self.sent),
        }  # fmt: skip

    def on_driver(self, action: Callable[[], object]) -> None:
        self.control.on_driver(action)


def _state(url: str) -> dict[str, Any]:
    return {"version": _get(url + "/model_info")["weight_version"]} | _get(url + "/state")


def _get(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(url, timeout=30, trust_env=False).json()
    return found


def wait_for(url: str) -> None:
    while not answers(url + "/health", 10.0):
        time.sleep(0.05)


def _die_at_bucket(url: str, bucket: int) -> None:
    httpx.post(url + "/die_at", json={"bucket": bucket}, timeout=30, trust_env=False)


def servers_that_die(path: Path, folder: Path, ports: list[int]) -> dict[str, Any]:
    """By what had happened to the servers before or in an update, what came of it."""
    names = ("0", "1", "1 again", "1 at last") if os.environ["RANK"] == "0" else ()
    lives = {name: Life(ports[int(name[0])]) for name in names}
    for name in names[:2]:
        lives[name].begin()
    trial, last_url = Trial(path, folder, ports), f"http://127.0.0.1:{ports[1]}"
    results = {"both live": trial.update(), "nothing happened": trial.update()}
    trial.on_driver(lambda: lives["1"].kill())
    results["one was killed"] = trial.update()
    trial.on_driver(lambda: lives["1 again"].begin())
    trial.on_driver(lambda: wait_for(last_url))
    results["it is back"] = trial.update()
    trial.on_driver(lambda: _die_at_bucket(last_url, 2))
    results["it dies in the update"] = trial.update()
    trial.on_driver(lambda: lives["0"].kill())
    trial.on_driver(threading.Timer(2.0, lambda: lives["1 at last"].begin()).start)
    results["all were dead for 2 s"] = trial.update()
    trial.engines.close()
    for life in lives.values():
        life.kill()
    return results
