"""All engines of a run: a rank owns one, or its part on a node, or none; all call the methods together."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from megatron_pmd.config import RunConfig
from megatron_pmd.device import SharedDevice
from megatron_pmd.distributed import Control
from megatron_pmd.engine import external
from megatron_pmd.engine.client import EngineControl, Tag, resident_bytes
from megatron_pmd.engine.device_memory import DeviceMemory, device_memory, wait_freed
from megatron_pmd.engine.external import Engine, ExternalEngine
from megatron_pmd.engine.health import Watch
from megatron_pmd.engine.placement import Place, place_of
from megatron_pmd.engine.server import answers, meeting_address, node_address
from megatron_pmd.engine.sglang import EngineProcess, EngineSpec, RouterProcess, RouterSpec, free_port
from megatron_pmd.errors import EngineError, PmdError
from megatron_pmd.observe.subphases import Parts

T = TypeVar("T")
PORT_TAKEN = ("address already in use", "is not available in 30 seconds")
"""How the system says so, and how SGLang does of a port that follows from another."""
RESTART_PAUSE_SECONDS = 2.0
"""Before the second attempt to start an engine again; about doubled for each further one."""


class Fleet:
    """The engines and the router before them.

    Collective: every actor rank calls every method but `any_alive`, in the same order. A failure on one
    leader is raised on all ranks, so that none waits for ever.
    """

    def __init__(
        self, config: RunConfig, control: Control, folder: Path, parts: Parts, *, cpu: bool,
        device: SharedDevice | None = None,
    ) -> None:  # fmt: skip
        """Starts this rank's engine, or its part of one, if it has any; logs go to folder/logs.

        parts: the clock that its sub-phases are entered into. device: the account that the actor keeps, too.
        Raises LayoutError for engines that cannot be shared out to the nodes, EngineError without a route
        between them.
        """
        self._config, self._control, self._folder, self._parts = config, control, folder, parts
        self._external = bool(config.rollout.servers)
        # a server of others has its own
        self._device = SharedDevice() if self._external or device is None else device
        keys = external.keys() if self._external else (secrets.token_hex(24), secrets.token_hex(24))
        self.key, self.admin_key = control.from_driver(keys)
        self.urls: list[str] = []
        self._engine: Engine | None = None
        self._calls: EngineControl | None = None
        self._router: RouterProcess | None = None
        self._watch: Watch | None = None
        self._resident: set[Tag] = set()
        """What this leader's engine holds in memory now."""
        self._taken: dict[Tag, int] = {}
        """Bytes that a kind of memory took of the device when it was last resumed."""
        nodes = control.all_gather(control.node)
        self._place = place_of(control.rank, nodes, config.ranks_per_engine, config.devices_per_engine)
        self._cpu = cpu
        self._start(range(config.engines))

    def _start(self, engines: Collection[int]) -> None:
        """Start these engines, on every node they reach; they answer later."""
        mine = self._place if self._place and self._place.engine in engines else None
        self._device.held |= {"weights", "kv_cache"}
        meetings = self._meetings(engines)
        if mine is None:
            return
        log: Path | None = None
        if self._external:
            server = urlsplit(self._config.rollout.servers[mine.engine])
            host, port = server.hostname or "", server.port or 0
        else:
            host = node_address()
            port = free_port(host)
            suffix = f"-node-{mine.part}" if mine.part else ""
            log = self._folder / "logs" / f"engine-{mine.engine}{suffix}.log"
        spec = EngineSpec(
            number=mine.engine,
            model=self._config.model,
            rollout=self._config.rollout,
            host=host,
            port=port,
            log=log,
            seed=self._config.seed + mine.engine,
            cpu=self._cpu,
            api_key=self.key,
            record_routing=self._config.actor.experts.replay_routing,
            admin_key=self.admin_key,
            first_gpu=int(os.environ.get("LOCAL_RANK", "0")),
            nodes=len(mine.nodes),
            node=mine.part,
            rendezvous=meetings.get(mine.engine),
        )
        self._start_part(spec)

    def _meetings(self, engines: Collection[int]) -> dict[int, str]:
        """By engine, host:port where its parts on several nodes find each other."""

        def meet(engine: int) -> tuple[int, str]:
            address = meeting_address()
            return engine, f"{address}:{free_port(address)}"

        return dict(
            self._on(
                lambda place: place.part == 0 and len(place.nodes) > 1 and place.engine in engines,
                lambda place: meet(place.engine),
            )
        )

    def _start_part(self, spec: EngineSpec) -> None:
        self._engine = ExternalEngine(spec) if self._external else EngineProcess(spec)
        self._resident = {"kv_cache", "weights"}
        if self.leads:
            self._calls = EngineControl(spec, self._config.sync.timeout_seconds)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that calls an engine."""
        return self._place is not None and self._place.part == 0

    @property
    def serves(self) -> tuple[int, ...]:
        """The ranks whose devices the engine that this rank leads computes on; () if it leads none."""
        return self._place.ranks if self._place is not None and self.leads else ()

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
        return _bearer(self.key)

    @property
    def admin_headers(self) -> dict[str, str]:
        """For calls to an engine that change or abort something; the router has none of them."""
        return _bearer(self.admin_key or self.key)

    def on_leaders(self, action: Callable[[Engine], T]) -> list[T]:
        """Run the action on every leader; on all ranks, returns their results or raises the first failure."""

        def act(_: Place) -> T:
            assert self._engine is not None, "a leader has an engine"
            return action(self._engine)

        return self._on(lambda place: place.part == 0, act)

    def _on(self, chosen: Callable[[Place], bool], action: Callable[[Place], T]) -> list[T]:
        """Run the action where the place is chosen; on all ranks, its results or the first failure."""
        acts = self._place is not None and chosen(self._place)
        outcome: tuple[T | None, PmdError | None] = (None, None)
        if acts and self._place is not None:
            try:
                outcome = (action(self._place), None)
            except PmdError as error:
                outcome = (None, error)
        outcomes = self._control.all_gather((acts, *outcome))
        for _, _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for acted, result, _ in outcomes if acted]

    def wait_ready(self) -> None:
        """Block until every engine answers; EngineError with the end of its log if one does not."""
        failures = self._failures_at_start(range(self._config.engines))
        for failure in failures.values():
            # SGLang looks for free ports and opens them much later: two starts at once may find the same
            if not any(words in failure.lower() for words in PORT_TAKEN):
                raise EngineError(failure)
        if failures:
            self._replace(failures)
        self._note_urls()

    def _failures_at_start(self, engines: Collection[int]) -> dict[int, str]:
        """Wait until these engines answer; by engine, why one does not."""

        def wait(engine: Engine) -> tuple[int, str] | None:
            number = engine.spec.number
            if number in engines:
                try:
                    engine.wait_ready(self._config.rollout.start_timeout_seconds)
                except EngineError as error:
                    return number, str(error)
            return None

        failures = dict(filter(None, self.on_leaders(wait)))
        # a part that died on another node may be the reason why the first one's process waited in vain
        others = self._control.all_gather(None if self.leads else self._own_loss(probe=False))
        for number, reason in filter(None, others):
            if number in failures:
                failures[number] += f"\n{reason}"
        return failures

    def _note_urls(self) -> None:
        self.urls = self.on_leaders(lambda engine: engine.url)

    def release(self) -> None:
        """Engines give their memory to the actors: the KV cache first, then the weights.

        One that does not, because it is dead or stuck, is killed: that frees its memory too.
        """

        def give_up(engine: Engine) -> int | None:
            self._unwatch()
            try:
                self._hand_over(["kv_cache", "weights"], self.calls.release, resident=False)
            except EngineError:
                if self._why_lost(engine) is None:
                    raise
                return engine.spec.number
            return None

        self._stop_parts([number for number in self.on_leaders(give_up) if number is not None])
        self._device.leave("kv_cache", "weights")

    def resume_weights(self) -> None:
        self._device.take("weights")
        self.on_leaders(lambda _: self._hand_over(["weights"], self.calls.resume, resident=True))

    def resume_cache(self) -> None:
        """Take the KV cache back and forget what earlier weights left in it."""

        def resume(_: Engine) -> None:
            self._hand_over(["kv_cache"], self.calls.resume, resident=True)
            with self._parts("flush"):
                self.calls.flush_cache()

        self._device.take("kv_cache")
        self.on_leaders(resume)

    def _hand_over(self, tags: list[Tag], call: Callable[[list[Tag]], None], *, resident: bool) -> None:
        """Release or resume kinds of memory, one call each; a server of others keeps its memory.

        An engine dies of being asked for what it has done already.
        """
        if self._external:
            return
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
        if self._engine is not None and self.leads:
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
        reasons = self._lost_parts(probe=probe)
        if reasons:
            self._replace(reasons)
            self._note_urls()
            if self._router is not None:
                self._router.stop()  # its picture of who is alive is out of date
                self._router = None
        return list(reasons.values())

    def any_lost(self) -> bool:
        """Whether an engine is dead or stuck."""
        return bool(self._lost_parts(probe=True))

    def _lost_parts(self, *, probe: bool) -> dict[int, str]:
        """By engine, what is wrong with it, or with its part on one of its nodes."""
        found: dict[int, str] = {}
        for number, reason in filter(None, self._control.all_gather(self._own_loss(probe=probe))):
            found.setdefault(number, reason)
        return found

    def _own_loss(self, *, probe: bool) -> tuple[int, str] | None:
        """The number of this rank's engine, and what is wrong with it or its part on this node."""
        reason = self._why_lost(self._engine, probe=probe) if self._engine is not None else None
        return (self._engine.spec.number, reason) if self._engine is not None and reason else None

    def _why_lost(self, engine: Engine, *, probe: bool = True) -> str | None:
        if self._watch is not None and self._watch.reason:
            return self._watch.reason
        try:
            engine.check_alive()
        except EngineError as died:
            return str(died)
        seconds = self._config.rollout.health_timeout_seconds
        if not probe or not self.leads or self.calls.responds(seconds):
            return None
        return f"engine {engine.spec.number} ({engine.url}) did not answer within {seconds:g} s"

    def _replace(self, reasons: dict[int, str]) -> None:
        """Kill what is left of these engines and start them again, on other ports.

        reasons: what was wrong with each.
        """
        lost = reasons
        for attempt in range(self._config.rollout.restarts):
            self._stop_parts(lost)
            time.sleep(RESTART_PAUSE_SECONDS * (2**attempt - 1))
            self._start(lost)
            lost = self._failures_at_start(lost)
            if not lost:
                return
        self._stop_parts(lost)
        number, failure = next(iter(lost.items()))
        raise EngineError(
            f"{reasons[number]}\nit was started again {self._config.rollout.restarts} times, in vain; "
            f"the last time: {failure}"
        )

    def _stop_parts(self, engines: Collection[int]) -> None:
        """Kill this rank's part of one of these engines."""
        if self._engine is not None and self._engine.spec.number in engines:
            self._unwatch()
            self._engine.stop()
            if self._calls is not None:
                self._calls.close()

    def any_alive(self) -> bool:
        """Whether the router runs and at least one engine's server answers. For the driver alone."""
        if self._router is not None and not self._router.alive():
            return False
        return any(answers(url + "/health", 10.0) for url in self.urls)

    def resident_bytes(self) -> int:
        """Memory of this rank's engine, or its part of one; 0 on ranks without.

        With CUDA: what others than this rank hold of its device.
        """
        engine = self._engine
        if engine is not None and not self._cpu and not self._external:
            return device_memory().others
        return resident_bytes(engine.pid) if isinstance(engine, EngineProcess) and engine.alive() else 0

    def stop(self) -> None:
        """End this rank's engine and router; not collective, never fails."""
        self._unwatch()
        if self._router is not None:
            self._router.stop()
        if self._engine is not None:
            self._engine.stop()


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
