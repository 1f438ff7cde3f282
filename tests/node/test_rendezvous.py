"""What someone who reaches the ranks' store can do with it, and what happens where nodes do not come."""

from __future__ import annotations

import base64
import pickle
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatron_pmd.errors import LaunchError
from megatron_pmd.network import LOOPBACK, Interface, loopback
from megatron_pmd.node import ranks
from megatron_pmd.node.ranks import Nodes
from megatron_pmd.node.rendezvous import NumberedNodes
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.store import open_store
from recipes import recipe


@dataclass
class Mark:
    """Leaves a file where it is unpickled."""

    path: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def listening() -> list[str]:
    """Addresses at which this process listens on TCP."""
    return [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def agents_meeting(rank: int, nodes: int, port: int, folder: Path) -> Any:
    """What the agent of a node meets the others with, made as torch's launcher makes it."""
    launch = ranks._launch_config(
        recipe("tiny_moe_cpu"), Nodes(nodes, rank, 1, f"{LOOPBACK}:{port}", attempt=1), folder, "spawn"
    )
    return get_rendezvous_handler(
        RendezvousParameters(
            launch.rdzv_backend, launch.rdzv_endpoint, launch.run_id, nodes, nodes, launch.local_addr,
            **launch.rdzv_configs,
        )
    )  # fmt: skip


def test_a_pickle_that_a_stranger_writes_into_the_store_is_not_unpickled(tmp_path: Path) -> None:
    """The attack that torch's c10d rendezvous falls for: it keeps its state, pickled, under the run's key."""
    port, before = free_port(), listening()
    first = agents_meeting(0, 2, port, tmp_path)
    met: list[Any] = []
    threads = [threading.Thread(target=lambda: met.append(first.next_rendezvous()), daemon=True)]
    threads[0].start()
    stranger = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=20))

    mark = pickle.dumps(Mark(str(tmp_path / "executed")))
    for key in {"torch.rendezvous.tiny_moe_cpu-1", *stranger.list_keys()}:
        stranger.set(key, base64.b64encode(mark).decode())
    second = agents_meeting(1, 2, port, tmp_path)
    threads.append(threading.Thread(target=lambda: met.append(second.next_rendezvous()), daemon=True))
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert not (tmp_path / "executed").exists()
    assert sorted(each.rank for each in met) == [0, 1], "and the run goes on"
    assert Counter(listening()) - Counter(before) == Counter([LOOPBACK])


@pytest.mark.parametrize("address", ["127.0.0.2", socket.gethostbyname("localhost")])
def test_a_store_is_reached_at_its_own_address_alone(address: str) -> None:
    store = open_store("127.0.0.2", 0, timedelta(seconds=5))
    reached = socket.socket().connect_ex((address, store.port)) == 0
    assert reached == (address == "127.0.0.2")


def test_ranks_of_one_machine_are_told_an_address_and_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's host name may stand for nothing; a rank that looks it up waits without a word."""
    monkeypatch.setattr(socket, "getfqdn", lambda name="": "no-such-host.invalid")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    given: list[Nodes] = []

    def run(config: object, folder: Path, nodes: Nodes, **options: object) -> RunOutcome:
        given.append(nodes)
        return RunOutcome(Status.COMPLETE)

    monkeypatch.setattr(ranks, "run_ranks", run)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "ib0")
    ranks.run_here(recipe("tiny_moe_cpu"), tmp_path)
    assert ranks.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert given[0].rendezvous == f"{LOOPBACK}:0"
    info = agents_meeting(0, 1, 0, tmp_path).next_rendezvous().bootstrap_store_info
    assert info.master_addr == LOOPBACK and info.master_port > 0
    assert loopback() == Interface("lo", LOOPBACK)


def test_a_node_that_does_not_come_is_named_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMD_NODES", "n1 n2")
    first = NumberedNodes(LOOPBACK, free_port(), rank=0, nodes=2, run_id="r", deadline_seconds=0.5)
    with pytest.raises(LaunchError, match=r"within 0\.5 s: node n2; have their"):
        first.next_rendezvous()
    second = NumberedNodes(LOOPBACK, free_port(), rank=1, nodes=2, run_id="r", deadline_seconds=0.5)
    with pytest.raises(LaunchError, match=r"node n2 did not reach the first node at 127\.0\.0\.1:\d+ within"):
        second.next_rendezvous()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        first = NumberedNodes(LOOPBACK, port, rank=0, nodes=1, run_id="r")
        with pytest.raises(LaunchError, match=rf"listen on 127\.0\.0\.1:{port}: Address already in use"):
            first.next_rendezvous()
