"""Ranks on several nodes, and servers elsewhere that take their weights: see tests/actor/launch.py."""

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
from megatron_pmd.engine.engine_nodes import Meeting
from megatron_pmd.engine.server import answers
from megatron_pmd.engine.sglang_server import EngineSpec
from megatron_pmd.node import engine_node
from megatron_pmd.training.separate_engines import SeparateEngines
from tests.actor.tiny_models import config_for
from tests.weight_sync.weights_server import Life, digest


class WithoutSampler(SeparateEngines):
    """The process that samples, and the router, have tests of their own."""

    def _started(self) -> Any: ...

    def _asked(self, ask: Any) -> Any: ...


class Trial:
    def __init__(
        self, path: Path, folder: Path, layout: dict[str, int], rollout: dict[str, Any],
        timeout_seconds: float, ranks_per_node: int,
    ) -> None:  # fmt: skip
        config = config_for(
            path, layout,
            rollout=Rollout(placement="separate", start_timeout_seconds=20, restarts=2, **rollout),
            sync=Sync(timeout_seconds=timeout_seconds, transport="broadcast"),
        )  # fmt: skip
        initialize(config.layout, seed=0, timeout_seconds=60)
        self.control = Control(120)
        self.control.node = self.control.rank // ranks_per_node
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
        said, self.sent, begun = len(self.said), 0, time.monotonic()
        report = self.engines.load(self.actor, self.version)
        seconds = time.monotonic() - begun
        exported = {name: digest(tensor.detach()) for name, tensor in self.actor.export()}
        urls = list(self.engines.fleet.urls)
        states = self.control.on_driver(lambda: [_state(url) for url in urls])
        return {
            "said": self.said[said:], "seconds": seconds, "exported": exported, "urls": urls,
            "servers": states, "buckets": report.buckets, "bytes": report.bytes,
            "sent": self.control.all_gather(self.sent),
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


def _order(url: str, what: str, **values: int) -> None:
    httpx.post(f"{url}/{what}", json=values, timeout=30, trust_env=False)


def servers_that_die(path: Path, folder: Path, ports: list[int]) -> dict[str, Any]:
    """By what had happened to the servers before or in an update, what came of it.

    Four ranks on two nodes, each node with a model in halves, and two servers.
    """
    names = ("0", "1", "1 again", "1 at last") if os.environ["RANK"] == "0" else ()
    lives = {name: Life() for name in names}
    for name in names[:2]:
        lives[name].begin(ports[int(name)])
    servers = tuple(f"http://127.0.0.1:{port}" for port in ports)
    trial, last_url = Trial(path, folder, dict(tensor=2, data=2), dict(servers=servers), 30, 2), servers[1]
    results = {"both live": trial.update(), "nothing happened": trial.update()}
    trial.on_driver(lambda: lives["1"].kill())
    results["one was killed"] = trial.update()
    trial.on_driver(lambda: lives["1 again"].begin(ports[1]))
    trial.on_driver(lambda: wait_for(last_url))
    results["it is back"] = trial.update()
    trial.on_driver(lambda: _order(last_url, "die_at", bucket=2))
    results["it dies in the update"] = trial.update()
    trial.on_driver(lambda: lives["0"].kill())
    trial.on_driver(threading.Timer(2.0, lambda: lives["1 at last"].begin(ports[1])).start)
    results["all were dead for 2 s"] = trial.update()
    trial.engines.close()
    for life in lives.values():
        life.kill()
    return results


class Played:
    """In the place of an engine node's EngineProcess."""

    lives: list[Life] = []
    """Of the engines that are still to be started."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.url, self._life = spec, spec.url, Played.lives.pop()
        self._life.begin(spec.port)

    def alive(self) -> bool:
        return self._life.alive()

    def wait_ready(self, deadline_seconds: float) -> None:
        wait_for(self.url)

    def stop(self) -> None:
        self._life.kill()


def _keep_engines(run: Path) -> None:
    """What the program of engine node 0 does."""
    engine_node.EngineProcess = Played  # type: ignore[assignment, misc]
    while (opening := Meeting(run).opening()) is None:
        time.sleep(0.05)
    node = engine_node.EngineNode(run, 0, opening)
    node.keep()
    node.close()


def engine_that_waits(path: Path, folder: Path) -> dict[str, Any]:
    """Three ranks on nodes of their own, the first of which sends to three engines of one engine node.

    gloo's tree has engine 0 pass on to engine 2 what rank 0 sends it, and rank 0 send to engine 1.
    """
    folder.mkdir(exist_ok=True)
    keeper = threading.Thread(target=_keep_engines, args=(folder,), daemon=True)
    if os.environ["RANK"] == "0":
        Played.lives = [Life() for _ in range(5)]
        keeper.start()
    quick = dict(ranks_per_engine=1, max_total_tokens=64, health_timeout_seconds=2.0)
    trial = Trial(path, folder, dict(data=3, engine_nodes=1), quick, 5, ranks_per_node=1)
    results, meeting = {"all live": trial.update()}, Meeting(folder)
    first = list(trial.engines.fleet.urls)
    trial.on_driver(lambda: _order(first[2], "wait_for_ever"))
    trial.on_driver(lambda: _order(first[0], "die_at", bucket=2))
    results["one died, and one waits for it"] = trial.update()

    def wait_for_new_ones() -> None:
        for number in (0, 2):
            while (url := meeting.announced(0, number)) in (None, first[number]):
                time.sleep(0.05)
            wait_for(url)

    trial.on_driver(wait_for_new_ones)
    results["both are back"] = trial.update()
    trial.engines.close()  # the node ends with the run
    if keeper.is_alive():
        keeper.join(30)
    return results
