"""Where a server listens, what it inherits, and what it survives."""

from __future__ import annotations

import os
import signal
import sys

import psutil
import pytest

from megatron_pmd.engine.server import (
    LOOPBACK,
    ServerProcess,
    free_port,
    inherited_environment,
    node_address,
)
from megatron_pmd.errors import EngineError


@pytest.mark.parametrize("rank", [None, "0"])
def test_servers_of_the_first_node_listen_on_loopback_alone(monkeypatch, rank):
    monkeypatch.delenv("GROUP_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("GROUP_RANK", rank)
        monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert node_address() == LOOPBACK


def own_addresses() -> list[str]:
    found = [a.address for interface in psutil.net_if_addrs().values() for a in interface]
    return [address for address in found if address.count(".") == 3]


@pytest.mark.parametrize("address", own_addresses())
def test_servers_of_another_node_listen_on_the_interface_towards_the_first(monkeypatch, address):
    """A machine's own address is reached from that address."""
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", address)
    assert node_address() == address


def test_a_first_node_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    with pytest.raises(EngineError, match=r"no-such-node\.invalid"):
        node_address()


def test_engines_of_other_nodes_are_called_without_a_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet")
    environment = inherited_environment(["10.0.0.7", LOOPBACK])
    assert environment["NO_PROXY"].split(",") == ["intranet", LOOPBACK, "localhost", "10.0.0.7"]


def test_a_server_outlives_the_signal_to_save_that_all_processes_of_a_job_get(tmp_path):
    """Slurm with proctrack/linuxproc sends it so."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", LOOPBACK, "-d", str(tmp_path), str(port)]
    url = f"http://{LOOPBACK}:{port}"
    server = ServerProcess("server", command, os.environ, url, "/", tmp_path / "logs" / "server.log")
    try:
        server.wait_ready(30)
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(tree) == 2
        for process in tree:
            process.send_signal(signal.SIGUSR1)
        assert server.ready() and server.alive()
    finally:
        server.stop()
