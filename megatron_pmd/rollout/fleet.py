"""All engines of a run: each leader rank owns one, every rank calls the same methods together."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from megatron_pmd.actor.parallel import Control
from megatron_pmd.config import RunConfig
from megatron_pmd.errors import PmdError
from megatron_pmd.rollout.child import node_address
from megatron_pmd.rollout.control import EngineControl, Tag, resident_bytes
from megatron_pmd.rollout.engine import EngineProcess, EngineSpec, RouterProcess, RouterSpec, free_port

T = TypeVar("T")


class Fleet:
    """The engines and the router before them.

    Collective: every actor rank calls every method but `any_alive`, in the same order. A failure on one
    leader is raised on all ranks, so that none waits for ever.
    """

    def __init__(self, config: RunConfig, control: Control, folder: Path, *, cpu: bool) -> None:
        """Starts this rank's engine, if it leads one, and returns at once; logs go to folder/logs."""
        self._config, self._control, self._folder = config, control, folder
        self.key = control.from_driver(secrets.token_hex(24) if control.is_driver else None)
        self.urls: list[str] = []
        self._engine: EngineProcess | None = None
        self._calls: EngineControl | None = None
        self._router: RouterProcess | None = None
        self._resident: set[Tag] = set()
        """What this leader's engine holds in memory now."""
        if control.rank % config.ranks_per_engine == 0:
            number, host = control.rank // config.ranks_per_engine, node_address()
            spec = EngineSpec(
                number=number,
                model=config.model,
                rollout=config.rollout,
                host=host,
                port=free_port(host),
                log=folder / "logs" / f"engine-{number}.log",
                seed=config.seed + number,
                cpu=cpu,
                api_key=self.key,
                record_routing=config.actor.experts.replay_routing,
                first_gpu=int(os.environ.get("LOCAL_RANK", "0")),
            )
            self._engine, self._resident = EngineProcess(spec), {"kv_cache", "weights"}
            self._calls = EngineControl(spec, config.sync.timeout_seconds)

    @property
    def leads(self) -> bool:
        return self._engine is not None

    @property
    def calls(self) -> EngineControl:
        """The control endpoints of this leader's engine."""
        assert self._calls is not None, "only a leader has an engine to call"
        return self._calls

    @property
    def router_url(self) -> str:
        """Where the driver sends its requests."""
        assert self._router is not None, "the router starts with serve()"
        return self._router.url

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def on_leaders(self, action: Callable[[EngineProcess], T]) -> list[T]:
        """Run the action on every leader; on all ranks, returns their results or raises the first failure."""
        outcome: tuple[T | None, PmdError | None] = (None, None)
        if self._engine is not None:
            try:
                outcome = (action(self._engine), None)
            except PmdError as error:
                outcome = (None, error)
        outcomes = self._control.all_gather((self.leads, *outcome))
        for _, _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for leads, result, _ in outcomes if leads]

    def wait_ready(self) -> None:
        """Block until every engine answers; EngineError with the end of its log if one does not."""

        def ready(engine: EngineProcess) -> str:
            engine.wait_ready(self._config.rollout.start_timeout_seconds)
            return engine.url

        self.urls = self.on_leaders(ready)

    def release(self) -> None:
        """Engines give their memory to the actors: the KV cache first, then the weights."""
        self.on_leaders(
            lambda _: self._hand_over(["kv_cache", "weights"], self.calls.release, resident=False)
        )

    def resume_weights(self) -> None:
        self.on_leaders(lambda _: self._hand_over(["weights"], self.calls.resume, resident=True))

    def resume_cache(self) -> None:
        """Take the KV cache back and forget what earlier weights left in it."""
        self.on_leaders(lambda _: self._hand_over(["kv_cache"], self.calls.resume, resident=True))
        self.on_leaders(lambda _: self.calls.flush_cache())

    def _hand_over(self, tags: list[Tag], call: Callable[[list[Tag]], None], *, resident: bool) -> None:
        """Release or resume kinds of memory, one call each.

        An engine dies of being asked for what it has done already.
        """
        for tag in tags:
            if (tag in self._resident) != resident:
                call([tag])
                self._resident ^= {tag}

    def serve(self) -> None:
        """Make the engines routable; on the driver, starts the router if there is none."""
        self._control.on_driver(self._start_router)

    def _start_router(self) -> None:
        if self._router is not None:
            return
        spec = RouterSpec(
            engines=self.urls,
            port=free_port(),
            log=self._folder / "logs" / "router.log",
            request_timeout_seconds=self._config.rollout.request_timeout_seconds,
            api_key=self.key,
        )
        self._router = RouterProcess(spec)
        self._router.wait_ready(self._config.rollout.start_timeout_seconds)

    def restart_dead(self) -> int:
        """Start every dead or silent engine again; returns how many. They hold no weights yet."""

        def restart(engine: EngineProcess) -> int:
            if engine.alive() and self.calls.health():
                return 0
            engine.stop()
            self._engine, self._resident = EngineProcess(engine.spec), {"kv_cache", "weights"}
            return 1

        restarted = sum(self.on_leaders(restart))
        if restarted:
            if self._router is not None:
                self._router.stop()  # its picture of who is alive is out of date
                self._router = None
            self.wait_ready()
        return restarted

    def any_alive(self) -> bool:
        """Whether at least one engine's server answers. For the driver alone."""
        for url in self.urls:
            try:
                if (
                    httpx.get(
                        url + "/health", headers=self.headers, timeout=10.0, trust_env=False
                    ).status_code
                    == 200
                ):
                    return True
            except httpx.HTTPError:
                continue
        return False

    def resident_bytes(self) -> int:
        """Memory of this leader's engine; 0 on other ranks."""
        return resident_bytes(self._engine.pid) if self._engine is not None and self._engine.alive() else 0

    def stop(self) -> None:
        """End this rank's engine and router; not collective, never fails."""
        if self._router is not None:
            self._router.stop()
        if self._engine is not None:
            self._engine.stop()
