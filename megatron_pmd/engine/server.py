"""A server as a child process: started under a supervisor, watched, stopped with everything it started."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from megatron_pmd.errors import EngineError
from megatron_pmd.files import write_whole
from megatron_pmd.network import LOOPBACK, address_towards
from megatron_pmd.waiting import waiting_for

POLL_SECONDS = 0.2
CONNECT_SECONDS = 10.0
LOG_TAIL_LINES = 15
SUPERVISOR = Path(__file__).parent / "supervisor.py"

# What torchrun tells its workers. An engine that inherits it joins the trainer's rendezvous, and hangs.
TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip


PORT_TAKEN = ("address already in use", "is not available in 30 seconds")
"""How the system says so, and how SGLang does of a port that follows from another."""


def port_was_taken(failure: str) -> bool:
    """Whether a server did not come up because another had its port by then (free_port)."""
    return any(words in failure.lower() for words in PORT_TAKEN)


PORTS = range(30_000, 32_768)
"""Below those that Linux gives to outgoing connections: of them one may be taken before a server listens.
SGLang then says so in its log, and lives on without answering."""


def free_port(host: str = LOOPBACK) -> int:
    """A TCP port nobody listens on now; another server can still take it before this one does."""
    draw = random.SystemRandom()
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind((host, port))
            return port


def node_address() -> str:
    """Where the driver, on the job's first node, reaches servers of this node; loopback on that node itself.

    torchrun says which node this is and where the first is: the address is that of the interface towards it,
    so that nothing listens on the cluster's other networks. Raises EngineError where there is no route.
    """
    if os.environ.get("GROUP_RANK", "0") == "0":
        return LOOPBACK
    master = os.environ["MASTER_ADDR"]
    try:
        return address_towards(master)
    except OSError as error:
        raise EngineError(f"no route to the job's first node {master} (MASTER_ADDR): {error}") from None


def meeting_address() -> str:
    """The address at which other nodes of the job reach this one; raises EngineError where there is none."""
    address = node_address()
    # on the first node, the agents' store listens where other nodes reach it
    return os.environ.get("MASTER_ADDR", LOOPBACK) if address == LOOPBACK else address


@functools.cache
def _authorities() -> ssl.SSLContext:
    """httpx else reads the certificates of all authorities at each call, also of http: 25 ms of a core."""
    return httpx.create_ssl_context(trust_env=False)


def answers(url: str, timeout_seconds: float) -> bool:
    """Whether GET gives status 200 within this time."""
    try:
        # a machine that is off says nothing at all
        patience = httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds))
        reply = httpx.get(url, timeout=patience, trust_env=False, verify=_authorities())
        return reply.status_code == 200
    except httpx.HTTPError:
        return False


def inherited_environment(hosts: Sequence[str] = ()) -> dict[str, str]:
    """This process's environment without torchrun's variables, and with no proxy for local addresses.

    hosts: further addresses that are called without a proxy.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    # SGLang's warm-up calls its own address over HTTP and dies when a proxy answers instead.
    local = [environment.get("NO_PROXY") or environment.get("no_proxy") or "", LOOPBACK, "localhost"]
    local += sorted(set(hosts) - set(local))
    environment["NO_PROXY"] = environment["no_proxy"] = ",".join(entry for entry in local if entry)
    return environment


def write_arguments(path: Path, arguments: Any) -> None:
    """Write arguments as JSON, for this user only: from a command line, every user could read the API key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(arguments, indent=1), mode=0o600)


def tail(log: Path, lines: int = LOG_TAIL_LINES, *, after: int = 0) -> str:
    """The last lines of a log; "" if there is none yet. after: so many bytes are of an earlier start."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(after, log.stat().st_size - 300 * lines))
        return "\n".join(file.read().decode(errors="replace").rstrip().splitlines()[-lines:])


class ServerProcess:
    """One HTTP server; when this process dies, however it dies, the server and its children die with it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        url: str,
        ready_path: str,
        log: Path,
    ) -> None:
        """Starts the server; its stdout and stderr are appended to log."""
        self.name, self.url, self.log = name, url, log
        self._ready_url = url + ready_path
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_before = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(os.getpid()), *command],
                env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Process id of the supervisor: every process of the server descends from it."""
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self) -> bool:
        """Whether the server accepts requests now."""
        return answers(self._ready_url, 5.0)

    def wait_ready(self, deadline_seconds: float, meanwhile: str = "") -> None:
        """Block until the server accepts requests; EngineError at once if it exits, or at the deadline.

        After 10 s, and then every 5 minutes, prints what is being waited for. meanwhile: why it takes long.
        """
        remark = (f": {meanwhile}" if meanwhile else "") + f"; log: {self.log}"
        with waiting_for(self._where(), deadline_seconds, remark=remark):
            self._wait_ready(deadline_seconds)

    def _wait_ready(self, deadline_seconds: float) -> None:
        started = time.monotonic()
        while not self.ready():
            waited = time.monotonic() - started
            if not self.alive():
                raise EngineError(
                    f"{self._where()} exited with status {self._process.returncode} at start; {self._log()}"
                )
            if waited > deadline_seconds:
                raise EngineError(
                    f"{self._where()} was not ready {waited:.0f} s after its start; {self._log()}"
                )
            time.sleep(POLL_SECONDS)

    def check_alive(self) -> None:
        """EngineError with the log's last lines if the server has exited."""
        if not self.alive():
            raise EngineError(f"{self._where()} died (status {self._process.returncode}); {self._log()}")

    def stop(self, grace_seconds: float = 10.0) -> None:
        """Kill the server and everything it started, at once; may be called again.

        SGLang's own way of stopping takes 8 s to drain requests; we stop an engine when there are none.
        """
        if not self.alive():
            return
        self._process.terminate()
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the server's main process goes with its supervisor
            self._process.wait()

    def _where(self) -> str:
        return f"{self.name} ({self.url})"

    def _log(self) -> str:
        return f"log: {self.log}, which ends:\n{tail(self.log, after=self._log_before)}"
