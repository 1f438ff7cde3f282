"""All engines of a run: which there are, where they run, how they are started, called and ended."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from megatron_pmd.config import RunConfig
from megatron_pmd.distributed import Control
from megatron_pmd.engine import external
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.engine_nodes import Meeting, Opening
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.engine.placement import part_of, senders_of
from megatron_pmd.engine.server import free_port, meeting_address, node_address
from megatron_pmd.engine.sglang_server import EngineSpec, NodeSpan, log_of
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.observe.versions import software

T = TypeVar("T")


class Fleet:
    """The engines. A rank runs one, or its part of one on its node, or none.

    Every actor rank calls start(), on_leaders() and note_urls(), in the same order: they are collective. A
    failure on one leader is raised on all ranks, so that none waits for ever.
    """

    def __init__(
        self, config: RunConfig, control: Control, folder: Path, clock: SubphaseClock, *, cpu: bool
    ) -> None:
        """Starts this rank's engine, or its part of one, if it has any; logs go to folder/logs. Collective.

        clock: measures what the engines hand over. Raises LayoutError for engines that cannot be shared out
        to the nodes, EngineError without a route between them.
        """
        self._config, self._control, self._folder, self._cpu = config, control, folder, cpu
        keys = external.keys() if config.rollout.servers else Keys.random()
        self.keys: Keys = control.from_driver(keys)
        self.urls: list[str] = []
        """Of every engine, once note_urls() has been called."""
        self.left_out: frozenset[int] = frozenset()
        """Engines elsewhere that are lost: nobody calls them until they answer again."""
        nodes = control.all_gather(control.node)
        part = part_of(control.rank, nodes, config.ranks_per_engine, config.devices_per_engine)
        self.senders = senders_of(control.rank, nodes, config) if self.elsewhere else ()
        """The ranks that send weights to the machine of this rank's engine, where that is elsewhere."""
        self._meeting = Meeting(folder)
        if config.layout.engine_nodes:
            control.on_driver(self._open)
        self.own = OwnEngine(part, config, clock, self._meeting) if part else None
        """What this rank runs."""
        self.start(self.engines)

    def _open(self) -> None:
        """Have the engine nodes start their engines."""
        config = self._config.model_dump(mode="json")
        self._meeting.open(Opening(config, self.keys, meeting_address(), software=software()))

    def start(self, engines: Collection[int]) -> None:
        """Start these engines, on every node they reach; they answer later."""
        rendezvous = self._rendezvous(engines)
        if self.own is not None and self.own.number in engines:
            self.own.start(self._spec(self.own, rendezvous.get(self.own.number)))

    def _rendezvous(self, engines: Collection[int]) -> dict[int, str]:
        """By engine, host:port where its parts on several nodes find each other."""

        def open_one(own: OwnEngine) -> tuple[int, str]:
            address = meeting_address()
            return own.number, f"{address}:{free_port(address)}"

        return dict(
            self._on(
                lambda own: own.part.leads and len(own.part.nodes) > 1 and own.number in engines, open_one
            )
        )

    def _spec(self, own: OwnEngine, rendezvous: str | None) -> EngineSpec:
        config, part = self._config, own.part
        log: Path | None = log_of(self._folder, own.number, part.node)
        if config.rollout.servers:
            server = urlsplit(config.rollout.servers[own.number])
            host, port, log = server.hostname or "", server.port or 0, None
        elif config.layout.engine_nodes:
            host, port = "", 0  # its node tells them
        else:
            host = node_address()
            port = free_port(host)
        span = NodeSpan(len(part.nodes), part.node, rendezvous)
        return EngineSpec.of_run(
            config, own.number, host=host, port=port, log=log, cpu=self._cpu, keys=self.keys,
            first_gpu=self._first_gpu(), span=span,
        )  # fmt: skip

    def _first_gpu(self) -> int:
        """Of this rank's engine: the rank's own, or the node's behind those of its ranks."""
        config, rank = self._config, int(os.environ.get("LOCAL_RANK", "0"))
        if config.rollout.placement == "colocated":
            return rank
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return ranks + rank // config.ranks_per_engine * config.rollout.tensor_parallel

    @property
    def engines(self) -> range:
        """Their numbers."""
        return range(self._config.engines)

    @property
    def elsewhere(self) -> bool:
        """Whether no rank starts them: they keep their memory, and come back by themselves."""
        return self._config.engines_elsewhere

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that calls an engine, and the engine is not left out."""
        own = self.own
        return own is not None and own.part.leads and own.number not in self.left_out

    @property
    def serves(self) -> tuple[int, ...]:
        """The ranks in whose buckets the weights for this rank's engine are; () if it leads none.

        Where engines are elsewhere: the senders to this one's machine; () if another is the first of them.
        Also of one that is left out: when it is back, the plan of the weights' ways still holds.
        """
        if self.own is None or not self.own.part.leads:
            return ()
        if not self.elsewhere:
            return self.own.part.ranks
        return self.senders if self.senders[0] == self._control.rank else ()

    @property
    def calls(self) -> EngineControl:
        """The control endpoints of this leader's engine."""
        assert self.own is not None, "only a leader has an engine to call"
        return self.own.calls

    def on_leaders(self, action: Callable[[OwnEngine], T]) -> list[T]:
        """Run the action on every leader; on all ranks, returns their results or raises the first failure."""
        return self._on(lambda _: self.leads, action)

    def _on(self, chosen: Callable[[OwnEngine], bool], action: Callable[[OwnEngine], T]) -> list[T]:
        """Run the action where the engine is chosen; on all ranks, its results or the first failure."""

        def act() -> list[T]:
            return [action(self.own)] if self.own is not None and chosen(self.own) else []

        return list(itertools.chain.from_iterable(self._control.on_all(act)))

    def note_urls(self) -> None:
        """Have every rank know where the engines are; after each start."""
        self.urls = self.on_leaders(lambda own: own.process.url)

    def watch(self) -> None:
        """Watch this leader's engine while it generates."""
        if self.own is not None and self.leads:
            self.own.watch()

    def kill(self, engines: Collection[int]) -> None:
        """End this rank's part of one of these engines."""
        if self.own is not None and self.own.number in engines:
            self.own.kill()

    def engine_bytes(self) -> int:
        """Memory of this rank's engine, or its part of one; 0 on ranks without."""
        return self.own.engine_bytes() if self.own is not None else 0

    def stop(self) -> None:
        """End this rank's engine; not collective, never fails."""
        if self._control.is_driver:
            self._meeting.close()
        if self.own is not None:
            self.own.unwatch()
            if not self.elsewhere:
                self.own.process.stop()
