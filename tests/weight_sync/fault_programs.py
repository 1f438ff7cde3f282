"""One rank with a real engine, and what can befall it: see tests/actor/launch.py."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import Rollout, RunConfig, Sync
from megatron_pmd.distributed import Control
from megatron_pmd.errors import PmdError
from megatron_pmd.observe.console import Console
from megatron_pmd.training.live_engines import LiveEngines
from tests.actor.tiny_models import config_for
from tests.weight_sync.faulty_transport import Fault, FaultyTransport

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
        self.sender = self.engines.weight_push
        self.transport = self.sender.transport
        self.events: list[str] = []
        """What became of the engine and of the actor's parameters, in order."""
        self._note_calls(self.engines.fleet.own, "start")
        self._note_calls(self.actor, "wake_parameters")
        self._note_calls(self.actor, "release_parameters")
        self._note_calls(self.sender, "push")

    def _note_calls(self, owner: Any, name: str) -> None:
        action = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            self.events.append(name)
            return action(*arguments, **options)

        setattr(owner, name, noted)

    @property
    def starts(self) -> int:
        """How often this rank's engine has been started."""
        return 1 + self.events.count("start")

    @property
    def engine(self) -> Any:
        """This rank's."""
        own = self.engines.fleet.own
        assert own is not None
        return own.process

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

    def during_sync(self, fault: Fault) -> None:
        """Have the fault happen at the second bucket of the next sync, once."""
        self.sender.transport = FaultyTransport(self.transport, fault, at_bucket=2)

    def without_fault(self) -> None:
        """What is sent next arrives as it is."""
        self.sender.transport = self.transport

    def served(self) -> dict[str, Any]:
        """What the router's answer to a request says of the engine behind it."""
        request = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3}}
        reply = httpx.post(
            self.engines.router.url + "/generate", json=request, headers=self.engines.fleet.keys.headers,
            timeout=60, trust_env=False,
        )  # fmt: skip
        return {"status": reply.status_code, "version": reply.json()["meta_info"]["weight_version"]}

    def iteration(self, *, expected_starts: int) -> dict[str, Any]:
        """Sync, resume, generate; and how often an engine has been started so far."""
        begun = time.monotonic()
        self.sync()
        self.without_fault()
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
    try:
        results = dict[str, Any](none=trial.iteration(expected_starts=1))
        results["router killed"] = _killed_router(trial)
        results |= _refused_buckets(trial)
        results["stopped while generating"] = _stopped_while_generating(trial)
        results |= _deaths_beside_a_sync(trial)
    finally:
        trial.engines.close()
    results["processes left"] = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    results["files left"] = [p.name for p in Path("/dev/shm").glob(f"*{trial.sender.run_key}*")]
    return results


def _killed_router(trial: Trial) -> dict[str, Any]:
    engines = trial.engines
    assert engines.router.process is not None
    engines.router.process.stop()
    noticed = not engines.router.reaches(engines.fleet.urls)
    engines.revive(trial.actor, trial.version)
    return {"noticed": noticed, "expected": str(trial.version)} | trial.served()


def _refused_buckets(trial: Trial) -> dict[str, Any]:
    """Of two updates that the engine refuses, its words; after each, an iteration with the same engine."""
    results: dict[str, Any] = {}
    trial.engines.release()
    trial.during_sync(lambda bucket, _: bucket.data[100:].add_(1))
    results["bucket corrupted"] = _message(trial.sync)
    trial.without_fault()
    results["after a corrupted bucket"] = trial.iteration(expected_starts=1)

    trial.engines.release()
    trial.during_sync(_drop_a_tensor)
    results["tensor dropped"] = _message(trial.sync)
    results["after a dropped tensor"] = trial.iteration(expected_starts=1)
    return results


def _stopped_while_generating(trial: Trial) -> dict[str, Any]:
    for process in [psutil.Process(trial.engine.pid), *trial.processes("")]:
        process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    while trial.engine.alive() and time.monotonic() - begun < 60:
        time.sleep(0.2)
    result = {
        "alive": trial.engine.alive(), "seconds": time.monotonic() - begun,
        "lost": trial.engines.recovery.any_lost(),
    }  # fmt: skip
    seen = len(trial.events)
    trial.engines.revive(trial.actor, trial.version)
    return result | trial.served() | {"expected": str(trial.version), "events": trial.events[seen:]}


def _deaths_beside_a_sync(trial: Trial) -> dict[str, Any]:
    """The scheduler stops before the engine is to release its memory; it is killed, or stops, in a sync.

    Killed before a release: two_engine_programs.py.
    """

    def scheduler() -> psutil.Process:
        return trial.processes("sglang::scheduler")[0]

    results: dict[str, Any] = {}
    scheduler().send_signal(signal.SIGSTOP)
    trial.engines.release()
    results["stopped before release"] = trial.iteration(expected_starts=3)

    trial.engines.release()
    trial.during_sync(lambda *_: scheduler().kill())
    seen = len(trial.events)
    results["killed during sync"] = trial.iteration(expected_starts=4)
    results["killed during sync"]["events"] = trial.events[seen:]

    trial.engines.release()
    trial.during_sync(lambda *_: scheduler().send_signal(signal.SIGSTOP))
    results["stopped during sync"] = trial.iteration(expected_starts=5)
    return results


def _drop_a_tensor(bucket: Any, descriptions: Sequence[dict[str, Any]]) -> None:
    """As if an exporter had forgotten it: neither the bucket nor its sums know of it."""
    for description in descriptions:
        description["tensors"].pop()
        description["sums"].pop()


def _message(action: Callable[[], None]) -> str:
    try:
        action()
    except PmdError as error:
        return f"{type(error).__name__}: {error}"
    return ""
