"""One rank with a real engine, and what can befall it: `python -m tests.weight_sync.fault_programs ORDER`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from megatron_pmd.actor.cpu import standins

if __name__ == "__main__":
    standins.install()

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import Rollout, RunConfig, Sync
from megatron_pmd.distributed import Control
from megatron_pmd.errors import PmdError
from megatron_pmd.observe.console import Console
from megatron_pmd.training.rollouts import LiveEngines
from tests.actor.launch import obey
from tests.actor.tiny_models import config_for

START_SECONDS = 180.0
"""A rank waits so long for one that starts an engine."""


class Trial:
    """An actor and the engines of its run, as one rank has them."""

    def __init__(self, config: RunConfig, folder: Path, tokenizer: Any = None, rewards: Any = None) -> None:
        initialize(config.layout, seed=0, timeout_seconds=60)
        self.control = Control(START_SECONDS)
        self.engines = LiveEngines(config, self.control, folder, tokenizer, rewards, Console(), cpu=True)
        self.actor = Actor(config, self.control)
        self.version = 0
        self.transport = self.engines._push._transport
        self.load_bucket = self.transport.load
        self.starts, start = 1, self.engines.fleet._start_part

        def counted(spec: Any) -> Any:
            self.starts += 1
            return start(spec)

        self.engines.fleet._start_part = counted  # type: ignore[method-assign]
        self.events: list[str] = []
        """What became of the actor's parameters, in order."""
        for owner, name in (
            (self.actor, "wake_parameters"), (self.actor, "release_parameters"), (self.engines._push, "push")
        ):  # fmt: skip
            setattr(owner, name, self._noting(name, getattr(owner, name)))

    def _noting(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.events.append(name)
            return action(*arguments, **options)

        return noted

    @property
    def engine(self) -> Any:
        """This rank's."""
        return self.engines.fleet._engine

    def processes(self, name: str) -> list[psutil.Process]:
        found = psutil.Process(self.engine.pid).children(recursive=True)
        return [p for p in found if name in " ".join(p.cmdline())]

    def sync(self) -> None:
        """Change every weight, and load the next version."""
        with torch.no_grad():
            for parameter in self.actor.chunks[0].parameters():
                parameter.mul_(1.01)
        self.version += 1
        self.engines.load(self.actor, self.version)

    def during_sync(self, fault: Callable[[Any, dict[str, Any]], None]) -> None:
        """Have the fault happen at the second bucket of the next sync, once."""
        seen = []

        def load(bucket: Any, description: dict[str, Any]) -> None:
            seen.append(description)
            if len(seen) == 2:
                fault(bucket, description)
            self.load_bucket(bucket, description)

        self.transport.load = load  # type: ignore[method-assign]

    def served(self) -> dict[str, Any]:
        """What the router's answer to a request says of the engine behind it."""
        request = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3}}
        reply = httpx.post(
            self.engines.fleet.router_url + "/generate", json=request, headers=self.engines.fleet.headers,
            timeout=60, trust_env=False,
        )  # fmt: skip
        return {"status": reply.status_code, "version": reply.json()["meta_info"]["weight_version"]}

    def iteration(self, *, expected_starts: int) -> dict[str, Any]:
        """Sync, resume, generate; and how often an engine has been started so far."""
        begun = time.monotonic()
        self.sync()
        self.transport.load = self.load_bucket  # type: ignore[method-assign]
        self.engines.resume()
        return self.served() | {
            "expected": str(self.version), "starts": self.starts, "expected_starts": expected_starts,
            "seconds": time.monotonic() - begun,
        }  # fmt: skip


def faults(path: Path, folder: Path, health_seconds: float, sync_seconds: float) -> dict[str, Any]:
    """One fault after another; by name, what came of it."""
    rollout = Rollout(
        max_total_tokens=1024, health_interval_seconds=1.0, health_timeout_seconds=health_seconds
    )
    # verified in full, so that no wrong weight passes
    sync = Sync(timeout_seconds=sync_seconds, verify="full")
    config = config_for(path).model_copy(update={"rollout": rollout, "sync": sync})
    trial = Trial(config, folder)
    engines, results = trial.engines, dict[str, Any]()
    try:
        results["none"] = trial.iteration(expected_starts=1)

        engines.fleet._router.stop()  # type: ignore[union-attr]
        results["router killed"] = {"noticed": not engines.fleet.any_alive()}
        engines._revive(trial.actor, trial.version)
        results["router killed"] |= trial.served() | {"expected": str(trial.version)}

        engines.release()
        trial.during_sync(lambda bucket, _: bucket.data[100:].add_(1))
        results["bucket corrupted"] = _message(trial.sync)
        trial.transport.load = trial.load_bucket  # type: ignore[method-assign]
        results["after a corrupted bucket"] = trial.iteration(expected_starts=1)

        engines.release()
        trial.during_sync(_drop_a_tensor)
        results["tensor dropped"] = _message(trial.sync)
        results["after a dropped tensor"] = trial.iteration(expected_starts=1)

        for process in [psutil.Process(trial.engine.pid), *trial.processes("")]:
            process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        while trial.engine.alive() and time.monotonic() - begun < 60:
            time.sleep(0.2)
        results["stopped while generating"] = {
            "alive": trial.engine.alive(), "seconds": time.monotonic() - begun,
            "lost": engines.fleet.any_lost(),
        }  # fmt: skip
        trial.events.clear()
        engines._revive(trial.actor, trial.version)
        results["stopped while generating"] |= trial.served() | {
            "expected": str(trial.version), "events": list(trial.events)
        }  # fmt: skip

        trial.processes("sglang::scheduler")[0].kill()
        engines.release()
        results["killed before release"] = trial.iteration(expected_starts=3)

        trial.processes("sglang::scheduler")[0].send_signal(signal.SIGSTOP)
        engines.release()
        results["stopped before release"] = trial.iteration(expected_starts=4)

        engines.release()
        trial.during_sync(lambda *_: trial.processes("sglang::scheduler")[0].kill())
        results["killed during sync"] = trial.iteration(expected_starts=5)

        engines.release()
        trial.during_sync(lambda *_: trial.processes("sglang::scheduler")[0].send_signal(signal.SIGSTOP))
        results["stopped during sync"] = trial.iteration(expected_starts=6)
    finally:
        engines.close()
    results["processes left"] = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    results["files left"] = [p.name for p in Path("/dev/shm").glob(f"*{engines._push._key}*")]
    return results


def _drop_a_tensor(bucket: Any, description: dict[str, Any]) -> None:
    """As if an exporter had forgotten it: neither the bucket nor its sums know of it."""
    description["tensors"].pop()
    description["sums"].pop()


def _message(action: Callable[[], None]) -> str:
    try:
        action()
    except PmdError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    obey(globals())
