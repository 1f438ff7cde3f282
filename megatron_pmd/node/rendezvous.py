"""Where torch's agents of a job's nodes meet: one store, on one address of the first node.

torch's own way for nodes that come and go (`c10d`) listens on all addresses and unpickles what it finds under
the run's key: whoever reaches the port runs code. Here every node has its number from the start, and nothing
that the agents read in the store is unpickled.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megatron_pmd.errors import LaunchError
from megatron_pmd.store import open_store
from megatron_pmd.waiting import waiting_for

BACKEND = "megatron-pmd"
DEADLINE_SECONDS = 300.0
"""For all nodes to come; on Slurm each has passed its pre-flight just before."""
POLL_SECONDS = 0.05
CONNECT_SECONDS = 1.0
STORE_TIMEOUT = timedelta(minutes=10)
"""Of the agents' later calls: torch's default of a static rendezvous."""


class NumberedNodes(RendezvousHandler):
    """All nodes of a job, each with its number; none joins later, and none is replaced."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rank: int,
        nodes: int,
        run_id: str,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """host, port: of the store, on the first node; port 0, for one node: any free one."""
        self._host, self._port, self._run_id = host, port, run_id
        self._rank, self._nodes, self._deadline_seconds = rank, nodes, deadline_seconds
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agents' store: they open none of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns when all nodes have come. Raises LaunchError naming those that have not by the deadline."""
        self._store = self._open() if self._rank == 0 else self._reach()
        store = PrefixStore(self._run_id, self._store)
        store.set(f"node/{self._rank}", "here")
        self._wait_for_all(store)
        return RendezvousInfo(
            store, self._rank, self._nodes, RendezvousStoreInfo(self._host, self._store.port)
        )

    def _open(self) -> TCPStore:
        try:
            return open_store(self._host, self._port, STORE_TIMEOUT)
        except OSError as error:
            raise LaunchError(
                f"the ranks' store cannot listen on {self._where}: {error.strerror or error}; started again, "
                "the job takes another port"
            ) from None

    def _reach(self) -> TCPStore:
        for _ in self._tries(f"the first node, at {self._where}"):
            try:
                # not by TCPStore itself: it fills the log with the frames of each attempt that is too early
                socket.create_connection((self._host, self._port), timeout=CONNECT_SECONDS).close()
                return TCPStore(self._host, self._port, is_master=False, timeout=STORE_TIMEOUT)
            except (OSError, DistError):
                time.sleep(POLL_SECONDS)
        raise LaunchError(
            f"{_name(self._rank)} did not reach the first node at {self._where} within "
            f"{self._deadline_seconds:g} s: does a firewall close that port between the nodes?"
        )

    def _wait_for_all(self, store: Store) -> None:
        absent = [0]
        with suppress(DistError):  # the first node, and the store with it, is gone
            for _ in self._tries("the job's other nodes"):
                absent = [rank for rank in range(self._nodes) if not store.check([f"node/{rank}"])]
                if not absent:
                    return
                time.sleep(POLL_SECONDS)
        raise LaunchError(
            f"not at {self._where} within {self._deadline_seconds:g} s: {', '.join(map(_name, absent))}; "
            "have their processes ended, or does a firewall close that port between the nodes?"
        )

    def _tries(self, what: str) -> Iterator[None]:
        """One yield a try, until the deadline; says after 10 s what is waited for."""
        begun = time.monotonic()
        with waiting_for(what, self._deadline_seconds):
            while time.monotonic() - begun < self._deadline_seconds:
                yield

    @property
    def _where(self) -> str:
        return f"{self._host}:{self._port}"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """No node can join in any case."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _name(rank: int) -> str:
    names = os.environ.get("PMD_NODES", "").split()
    return f"node {names[rank]}" if rank < len(names) else f"node number {rank}"


def _of(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    return NumberedNodes(
        host, port, rank=parameters.config["rank"], nodes=parameters.max_nodes, run_id=parameters.run_id
    )


rendezvous_handler_registry.register(BACKEND, _of)
