"""Waits that a user can stand before say for what; each is made to last a moment, and told after 50 ms."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pmd.config import RemoteReward, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.distributed import Control
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.external import ExternalEngine
from megatron_pmd.engine.keys import NO_KEYS
from megatron_pmd.errors import EngineError, LaunchError, PmdError
from megatron_pmd.heartbeat import Heartbeat
from megatron_pmd.launch.slurm import slurm
from megatron_pmd.node import preflight
from megatron_pmd.node.allocation import Allocation

pytestmark = pytest.mark.usefixtures("impatient")


class Slow(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        time.sleep(0.3)
        self.send_error(404)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def slow_server() -> Any:
    """host:port of a server that thinks for 0.3 s."""
    server = HTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition(" s so far")[0] for line in capsys.readouterr().err.splitlines()]


def test_a_slurm_command(capsys: pytest.CaptureFixture[str]) -> None:
    slurm("sleep", "0.3")
    assert said(capsys) == ["waiting for an answer of sleep 0.3, 0"]


def test_an_engine_that_is_called(slow_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Release, resume, every weight bucket and the version are such calls."""
    host, port = slow_server.split(":")
    spec: Any = SimpleNamespace(
        url=f"http://{slow_server}", host=host, port=int(port), number=3, log=None,
        keys=SimpleNamespace(admin_headers={}, headers={}),
    )  # fmt: skip
    with EngineControl(spec, 60) as calls, pytest.raises(EngineError):
        calls.release(["weights"])
    where = f"engine 3 (127.0.0.1, port {port})"
    assert said(capsys) == [f"waiting for {where} to answer /release_memory_occupation, 0"]


def test_a_server_of_others_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    spec: Any = SimpleNamespace(
        url="http://127.0.0.1:9", host="127.0.0.1", port=9, number=0, log=None, keys=NO_KEYS
    )
    with pytest.raises(EngineError):
        ExternalEngine(spec).wait_ready(0.2)
    assert said(capsys) == ["waiting for server 0 of rollout.servers (http://127.0.0.1:9), 0"]


def test_a_reward_service(slow_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_pmd.rewards.remote import RemoteReward as Service

    url = f"http://{slow_server}/"
    reward = Reward(name="remote", remote=RemoteReward(url=url, retries=0), timeout_seconds=5)
    with Service(reward) as rewards:
        for verdict in [rewards.submit("x", Problem(0, (), ""), False) for _ in range(4)]:
            with suppress(PmdError):
                verdict.result(20)
    assert said(capsys) == [f"waiting for a verdict of the reward service {url}, 0"]


def test_the_pre_flight_of_other_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMD_NODES", "n1 n2 n3")
    allocation = Allocation("n1", 0, 3, 1, 1, tmp_path, "n1", 1)
    with pytest.raises(LaunchError):
        preflight.exchange(preflight.Report("n1"), tmp_path, allocation, deadline_seconds=0.3)
    assert said(capsys) == [f"waiting for pre-flight reports in {tmp_path} of nodes n2 n3, 0"]


def test_other_ranks_of_which_the_driver_alone_tells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    control = object.__new__(Control)
    control.heartbeat = Heartbeat()
    control.heartbeat.enter("update", 3, patience_seconds=1)
    control.world, control._timeout_seconds = 4, 600.0
    for control.rank in (0, 1):
        with control._waiting():
            time.sleep(0.2)
    (told,) = capsys.readouterr().err.splitlines()
    assert told == "waiting for the other 3 ranks, 0 s so far, at most 600 s, in update of iteration 3"


def test_nodes_that_do_not_come_to_the_rendezvous(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_pmd.node.rendezvous import NumberedNodes

    with pytest.raises(LaunchError):
        NumberedNodes("127.0.0.1", 0, rank=0, nodes=2, run_id="x", deadline_seconds=0.3).next_rendezvous()
    assert said(capsys) == ["waiting for the job's other nodes, 0"]
