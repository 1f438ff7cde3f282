"""Two ranks with an engine each, and deaths: see tests/actor/launch.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import Batch, Rollout, Sync
from megatron_pmd.data.problems import Problem
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.weight_sync.broadcast import Broadcast
from megatron_pmd.weight_sync.push import PushReport, WeightPush
from tests.actor.tiny_models import config_for
from tests.rollout.test_sampler import Grading, Numbers, rollout_for
from tests.weight_sync.fault_programs import Trial

BATCH = Batch(
    prompts_per_rollout=4, samples_per_prompt=4, prompts_per_step=4, max_tokens_per_microbatch=1000,
    max_prompt_tokens=20, max_response_tokens=300,
)  # fmt: skip
SHORT_TOKENS = 40
"""Length of the first group's responses; when they are finished, all others are under way."""


class Endless(Numbers):
    """Knows no token that ends a response: each has the length it is given."""

    eos_token_id = None


class Senders:
    """A push to engines that are elsewhere, although these are not."""

    def __init__(self, push: WeightPush, senders: tuple[int, ...]) -> None:
        self._push, self._senders = push, senders

    def push(self, *arguments: Any, serves: Any, **options: Any) -> PushReport:
        return self._push.push(*arguments, serves=self._senders, **options)


class Pair:
    """The trial of two ranks, whose driver draws rollouts."""

    def __init__(self, path: Path, folder: Path) -> None:
        config = config_for(path, dict(data=2)).model_copy(
            update={
                # some requests wait in their engine
                "rollout": Rollout(max_total_tokens=4096, max_running_requests=4),
                "sync": Sync(timeout_seconds=60, verify="full"),
                "batch": BATCH,
            }
        )
        self.trial = Trial(config, folder, Endless(), Grading(lambda *_: 1.0))
        self.control, self.engines = self.trial.control, self.trial.engines

    @property
    def is_driver(self) -> bool:
        return self.control.is_driver

    def rollout(self, blow: Callable[[], None]) -> dict[str, Any]:
        """A rollout in whose middle the blow falls; where it fell, and what came of the rollout."""
        rollout = self._groups() if self.is_driver else None
        record: dict[str, Any] = {}
        striker = threading.Thread(target=self._strike, args=(rollout, blow, record), daemon=True)
        if rollout:
            striker.start()
        begun = time.monotonic()
        samples = self.engines.draw(rollout, self.trial.actor, "rollout")
        record["seconds"] = time.monotonic() - begun
        if rollout:
            striker.join()
            record |= {
                "numbers": [(sample.group, sample.number) for sample in samples],
                "lengths": [len(sample.response_tokens) for sample in samples],
                "budgets": [m.problem.token_budget for group in rollout.groups for m in group.members],
                "versions": {segment.weight_version for sample in samples for segment in sample.segments},
                "started": rollout.accounts.started,
                "sampled tokens": rollout.accounts.sampled_tokens,
            }
        return record | self._state() | {"difference": self._difference(samples)}

    def _state(self) -> dict[str, Any]:
        router = self.engines.router.process
        return {
            "version": self.trial.version,
            "starts": self.trial.starts,
            "router": router.pid if router else None,
        }

    def _groups(self) -> RolloutGroups:
        budgets = [SHORT_TOKENS] + [BATCH.max_response_tokens] * (BATCH.prompts_per_rollout - 1)
        problems = [
            Problem(index=i, messages=(), answer="", tokens=(5, 10 * i + 1), token_budget=budget)
            for i, budget in enumerate(budgets)
        ]
        version = self.trial.version
        return rollout_for(0, problems=problems, iteration=version, weight_version=version)

    def _strike(self, rollout: RolloutGroups, blow: Callable[[], None], record: dict[str, Any]) -> None:
        """Once a group is finished while both engines have work."""
        while rollout.finished < rollout.total:
            in_flight = [self._in_flight(url) for url in self.engines.fleet.urls]
            if rollout.finished >= BATCH.samples_per_prompt and all(in_flight):
                blow()
                record |= {"in flight": in_flight, "finished before": rollout.finished}
                return
            time.sleep(0.02)

    def _in_flight(self, url: str) -> int:
        """Requests that the engine works on, or that wait in it, when it last noted them."""
        reply = httpx.get(
            url + "/v1/loads", headers=self.engines.fleet.keys.headers, timeout=60, trust_env=False
        ).json()
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in reply["loads"])

    def _difference(self, samples: list[Sample]) -> float:
        """Largest |log π_actor − log π_engine| of the sampled tokens that this rank computes."""
        batch = self.control.from_driver(RolloutBatch.pack(samples, 1.0) if self.is_driver else None)
        actor = self.trial.actor
        return actor.log_probs(batch, actor.microbatches(batch, np.arange(len(batch)))).max_absolute

    def served(self) -> dict[str, Any]:
        """What the router's answers to four requests say, and what each engine itself."""
        answers = self.control.on_driver(lambda: [self.trial.served() for _ in range(4)])
        own = self.engines.fleet.on_leaders(lambda _: self.engines.fleet.calls.weight_version())
        return self._state() | {"answers": answers, "versions": own}

    def next_version(self) -> dict[str, Any]:
        self.trial.sync()
        self.engines.resume()
        return self.served()

    def next_version_by_broadcast(self) -> dict[str, Any]:
        """As to engines of one machine elsewhere; and the checksums that SGLang has of the weights."""
        engines, ours = self.engines, self.engines.weight_push
        before = engines.fleet.on_leaders(lambda _: self._checksums())
        engines.fleet.senders = (0, 1)
        broadcast = Broadcast(engines.fleet, self.control, timeout_seconds=60)
        push = WeightPush(
            broadcast, self.control, "broadcast", engines.clock, bucket_bytes=2**20, timeout_seconds=60
        )
        engines.weight_push = Senders(push, (0, 1) if self.is_driver else ())  # type: ignore[assignment]
        engines.release()
        seen = self.next_version() | {"before": before}
        push.close()
        engines.weight_push = ours
        return seen | {"after": engines.fleet.on_leaders(lambda _: self._checksums())}

    def _checksums(self) -> dict[str, str]:
        """By parameter of this rank's engine."""
        keys = self.engines.fleet.keys
        reply = httpx.post(
            self.trial.engine.url + "/weights_checker", json={"action": "checksum"},
            headers=keys.admin_headers, timeout=60, trust_env=False,
        ).json()  # fmt: skip
        [rank] = reply["ranks"]
        found: dict[str, str] = rank["checksums"]
        return found


def two_engines(path: Path, folder: Path) -> dict[str, Any]:
    """Three rollouts and three syncs, and something dies in each; by its name, what this rank saw."""
    pair = Pair(path, folder)
    trial, engines, results = pair.trial, pair.engines, dict[str, Any]()
    try:
        pair.next_version()
        pids = pair.control.all_gather((_server(trial), trial.processes("sglang::scheduler")[0].pid))
        (first_server, _), (_, second_scheduler) = pids
        results["engine killed"] = pair.rollout(lambda: psutil.Process(second_scheduler).kill())
        engines.release()
        results["sync after a killed engine"] = pair.next_version()
        results["broadcast"] = pair.next_version_by_broadcast()

        results["router killed"] = pair.rollout(lambda: _kill_router(trial))
        engines.release()
        if pair.is_driver:
            trial.during_sync(lambda *_: _kill_router(trial))
        results["router killed during sync"] = pair.next_version()

        results["server killed"] = pair.rollout(lambda: psutil.Process(first_server).kill())
    finally:
        engines.close()
    results["processes left"] = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    return results


def _server(trial: Trial) -> int:
    """The engine's main process: it answers requests, and its supervisor outlives it."""
    return psutil.Process(trial.engine.pid).children()[0].pid


def _kill_router(trial: Trial) -> None:
    router = trial.engines.router.process
    assert router is not None
    for process in psutil.Process(router.pid).children(recursive=True):
        process.kill()
