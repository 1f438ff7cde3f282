"""All engines of a run: each leader rank owns one, every rank calls the same methods together."""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from megatron_pmd.actor.parallel import Control
from megatron_pmd.config import RunConfig
from megatron_pmd.errors import EngineError, PmdError
from megatron_pmd.observe.parts import Parts
from megatron_pmd.rollout.child import node_address
from megatron_pmd.rollout.control import EngineControl, Tag, resident_bytes
from megatron_pmd.rollout.engine import EngineProcess, EngineSpec, RouterProcess, RouterSpec, free_port
from megatron_pmd.rollout.memory import DeviceMemory, device_memory, wait_freed
from megatron_pmd.rollout.watch import Watch

T = TypeVar("T")
RESTART_PAUSE_SECONDS = 2.0
"""Before the second attempt to start an engine again; about doubled for each further one."""


class Fleet:
    """The engines and the router before them.

    Collective: every actor rank calls every method but `any_alive`, in the same order. A failure on one
    leader is raised on all ranks, so that none waits for ever.
    """

    def __init__(self, config: RunConfig, control: Control, folder: Path, parts: Parts, *, cpu: bool) -> None:
        """Starts this rank's engine, if it leads one, and returns at once; logs go to folder/logs.

        parts: the clock that its sub-phases are entered into.
        """
        self._config, self._control, self._folder, self._parts = config, control, folder, parts
        keys = [secrets.token_hex(24) for _ in range(2)] if control.is_driver else None
        self.key, self.admin_key = control.from_driver(keys)
        self.urls: list[str] = []
        self._engine: EngineProcess | None = None
        self._calls: EngineControl | None = None
        self._router: RouterProcess | None = None
        self._watch: Watch | None = None
        self._resident: set[Tag] = set()
        """What this leader's engine holds in memory now."""
        self._taken: dict[Tag, int] = {}
        """Bytes that a kind of memory took of the device when it was last resumed."""
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
                admin_key=self.admin_key,
                first_gpu=int(os.environ.get("LOCAL_RANK", "0")),
            )
            self._start(spec)

    def _start(self, spec: EngineSpec) -> EngineProcess:
        """Start this leader's engine; it answers later."""
        self._engine, self._resident = EngineProcess(spec), {"kv_cache", "weights"}
        self._calls = EngineControl(spec, self._config.sync.timeout_seconds)
        return self._engine

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
        """For requests to the router and the engines."""
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def admin_headers(self) -> dict[str, str]:
        """For calls to an engine that change or abort something; the router has none of them."""
        return {"Authorization": f"Bearer {self.admin_key}"}

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
            try:
                engine.wait_ready(self._config.rollout.start_timeout_seconds)
            except EngineError as error:
                # SGLang looks for free ports and opens them much later: two starts at once may find the same
                if "address already in use" not in str(error).lower():
                    raise
                engine = self._replace(engine, str(error))
            return engine.url

        self.urls = self.on_leaders(ready)

    def release(self) -> None:
        """Engines give their memory to the actors: the KV cache first, then the weights.

        One that does not, because it is dead or stuck, is killed: that frees its memory too.
        """

        def give_up(engine: EngineProcess) -> None:
            self._unwatch()
            try:
                self._hand_over(["kv_cache", "weights"], self.calls.release, resident=False)
            except EngineError:
                if self._why_lost(engine) is None:
                    raise
                engine.stop()

        self.on_leaders(give_up)

    def resume_weights(self) -> None:
        self.on_leaders(lambda _: self._hand_over(["weights"], self.calls.resume, resident=True))

    def resume_cache(self) -> None:
        """Take the KV cache back and forget what earlier weights left in it."""

        def resume(_: EngineProcess) -> None:
            self._hand_over(["kv_cache"], self.calls.resume, resident=True)
            with self._parts("flush"):
                self.calls.flush_cache()

        self.on_leaders(resume)

    def _hand_over(self, tags: list[Tag], call: Callable[[list[Tag]], None], *, resident: bool) -> None:
        """Release or resume kinds of memory, one call each.

        An engine dies of being asked for what it has done already.
        """
        for tag in tags:
            if (tag in self._resident) != resident:
                with self._parts(tag):
                    before = None if self.calls.spec.cpu else device_memory()
                    call([tag])
                    if before is not None:
                        self._check_memory(tag, before, resident=resident)
                self._resident ^= {tag}

    def _check_memory(self, tag: Tag, before: DeviceMemory, *, resident: bool) -> None:
        """A release has to give back what the last resume of this kind of memory took."""
        if resident:
            self._taken[tag] = before.free - device_memory().free
            return
        wait_freed(
            device_memory, before, self._taken.get(tag, 1), what=f"engine {self.calls.spec.number}, {tag}",
            deadline_seconds=self._config.sync.timeout_seconds,
        )  # fmt: skip

    def serve(self) -> None:
        """Make the engines routable and watch them; on the driver, starts the router if there is none."""
        self._control.on_driver(self._start_router)
        if self._engine is not None:
            rollout = self._config.rollout
            self._unwatch()
            self._watch = Watch(
                self._engine, self.calls.spec, rollout.health_interval_seconds, rollout.health_timeout_seconds
            )

    def _unwatch(self) -> None:
        """No health check is under way after this: one that generates on released memory kills the engine."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _start_router(self) -> None:
        if self._router is not None and self._router.alive():
            return
        spec = RouterSpec(
            engines=self.urls,
            port=free_port(),
            log=self._folder / "logs" / "router.log",
            request_timeout_seconds=self._config.rollout.request_timeout_seconds,
            api_key=self.key,
            policy=self._config.rollout.router_policy,
        )
        self._router = RouterProcess(spec)
        self._router.wait_ready(self._config.rollout.start_timeout_seconds)

    def restart_lost(self, *, probe: bool) -> list[str]:
        """Start every dead or stuck engine again; returns what was wrong with each. They hold no weights yet.

        probe: ask each whether it responds; without it, a stuck engine shows at its next call's deadline.
        Raises EngineError for one that does not come up in `rollout.restarts` attempts.
        """

        def check(engine: EngineProcess) -> tuple[str | None, str]:
            reason = self._why_lost(engine, probe=probe)
            return reason, engine.url if reason is None else self._replace(engine, reason).url

        outcomes = self.on_leaders(check)
        self.urls = [url for _, url in outcomes]
        reasons = [reason for reason, _ in outcomes if reason is not None]
        if reasons and self._router is not None:
            self._router.stop()  # its picture of who is alive is out of date
            self._router = None
        return reasons

    def any_lost(self) -> bool:
        """Whether an engine is dead or stuck."""
        return any(self.on_leaders(lambda engine: self._why_lost(engine) is not None))

    def _why_lost(self, engine: EngineProcess, *, probe: bool = True) -> str | None:
        if self._watch is not None and self._watch.reason:
            return self._watch.reason
        try:
            engine.check_alive()
        except EngineError as died:
            return str(died)
        seconds = self._config.rollout.health_timeout_seconds
        if not probe or self.calls.responds(seconds):
            return None
        return f"engine {engine.spec.number} ({engine.url}) did not answer within {seconds:g} s"

    def _replace(self, lost: EngineProcess, reason: str) -> EngineProcess:
        """Kill what is left of this leader's engine and start it again, on another port."""
        self._unwatch()
        lost.stop()
        failure: EngineError | None = None
        for attempt in range(self._config.rollout.restarts):
            time.sleep(RESTART_PAUSE_SECONDS * (2**attempt - 1))
            self.calls.close()
            engine = self._start(dataclasses.replace(lost.spec, port=free_port(lost.spec.host)))
            try:
                engine.wait_ready(self._config.rollout.start_timeout_seconds)
                return engine
            except EngineError as error:
                failure = error
                engine.stop()
        raise EngineError(
            f"{reason}\nit was started again {self._config.rollout.restarts} times, in vain; "
            f"the last time: {failure}"
        )

    def any_alive(self) -> bool:
        """Whether the router runs and at least one engine's server answers. For the driver alone."""
        if self._router is not None and not self._router.alive():
            return False
        for url in self.urls:
            try:
                if httpx.get(url + "/health", timeout=10.0, trust_env=False).status_code == 200:
                    return True
            except httpx.HTTPError:
                continue
        return False

    def resident_bytes(self) -> int:
        """Memory of this leader's engine; 0 on other ranks."""
        return resident_bytes(self._engine.pid) if self._engine is not None and self._engine.alive() else 0

    def stop(self) -> None:
        """End this rank's engine and router; not collective, never fails."""
        self._unwatch()
        if self._router is not None:
            self._router.stop()
        if self._engine is not None:
            self._engine.stop()
