"""Where a server listens, what it inherits, and what it survives."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_pmd.engine.server import (
    LOOPBACK,
    ServerProcess,
    free_port,
    inherited_environment,
    node_address,
)
from megatron_pmd.engine.supervisor import FIRST_LOOK_SECONDS
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


LEAVES_FILES = """
import os, pathlib, signal, tempfile
print(tempfile.NamedTemporaryFile(delete=False).name, flush=True)
signal.pause()
"""


@pytest.fixture
def temporary(monkeypatch):
    """The folder for temporary files; a short path, as sockets need."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def start(tmp_path, temporary):
    """Start a server that leaves a temporary file; its supervisor, and the file once it is there."""
    started: list[ServerProcess] = []

    def start():
        log = tmp_path / f"{len(started)}.log"
        command = [sys.executable, "-c", LEAVES_FILES]
        started.append(ServerProcess("server", command, os.environ, f"http://{LOOPBACK}:9", "/", log))
        limit = time.monotonic() + 30
        while not log.read_text().endswith("\n"):
            assert time.monotonic() < limit
            time.sleep(0.01)
        return started[-1], Path(log.read_text().strip())

    yield start
    for server in started:
        server.stop()


def test_a_servers_temporary_files_are_its_users_alone_and_go_with_it(start, temporary):
    server, file = start()
    assert file.parent.parent == temporary
    assert file.parent.stat().st_mode & 0o777 == 0o700
    server.stop()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_supervisor_left_is_removed_at_the_next_start_and_nothing_else(start, temporary):
    killed, left = start()
    _, kept = start()
    supervisor = psutil.Process(killed.pid)
    supervisor.kill()
    psutil.wait_procs([supervisor], timeout=20)
    assert left.exists()
    for folder in temporary.iterdir():
        os.utime(folder, (0, 0))
    _, new = start()
    assert not left.exists() and kept.exists() and new.exists()


MAPS_MEMORY = """
import mmap, os, time
path = f"/dev/shm/sgl_shm_{os.getpid()}"
with open(path, "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print(path, flush=True)
time.sleep(120)
"""


def test_what_a_server_has_in_shared_memory_goes_also_when_the_server_is_killed(tmp_path):
    """When the supervisor notices, no process maps it any more: it has looked before."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", MAPS_MEMORY]
    server = ServerProcess("server", command, os.environ, f"http://{LOOPBACK}:9", "/", log)
    supervisor = psutil.Process(server.pid)
    while not log.read_text().endswith("\n"):
        time.sleep(0.01)
    time.sleep(FIRST_LOOK_SECONDS + 1)
    assert Path(log.read_text().strip()).exists()
    for process in supervisor.children():
        process.kill()
    psutil.wait_procs([supervisor], timeout=20)
    assert not Path(log.read_text().strip()).exists()


def test_a_servers_port_is_none_that_an_outgoing_connection_may_have() -> None:
    """SGLang that finds its port taken lives on without answering, until the deadline of its start."""
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as listener:
        taken = free_port()
        listener.bind((LOOPBACK, taken))
        found = {free_port() for _ in range(200)}
    assert len(found) > 100 and max(found) < min(first_outgoing, 32_768) and taken not in found
