"""A reward service over HTTP: what it is sent, which of its failures cost a sample, and which end the run."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_pmd.config import RemoteReward as Service
from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.rewards import service as service_module
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rewards.pool import RewardPool, Verdict
from megatron_pmd.rewards.remote import RemoteReward

PROBLEM = Problem(
    index=3,
    messages=({"role": "user", "content": "6 * 7"},),
    answer="42",
    metadata={"when": b"1", "level": float("nan"), "range": [1.5, float("inf")]},
)
Reply = tuple[int, Any]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@contextmanager
def service(
    answer: Callable[[dict[str, Any]], Reply], info: Any = None, port: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL, and what it was sent. info: what it answers to every GET."""
    sent: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            sent.append(json.loads(content, parse_constant=_refuse))
            self.reply(*answer(sent[-1]))

        def do_GET(self) -> None:
            self.reply(200, info)

        def reply(self, status: int, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None: ...  # a client that gave up

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/grade", sent
    server.shutdown()
    server.server_close()


def reward(url: str, **changes: Any) -> Reward:
    return Reward(
        name="remote",
        remote=Service(url=url, retries=2),
        timeout_seconds=changes.pop("seconds", 5),
        **changes,
    )


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(service_module, "RETRY_PAUSE_SECONDS", 0.01)


def test_the_service_gets_the_graded_part_and_the_problem_and_its_number_is_the_reward():
    right = lambda body: (200, {"reward": float(body["response"] == body["answer"])})  # noqa: E731
    with service(right) as (url, sent), grading(reward(url, answer="last_integer")) as rewards:
        verdicts = rewards.grade([("it is 42.", PROBLEM), ("it is 41", PROBLEM)])
    assert verdicts == [Verdict(1.0), Verdict(0.0)]
    assert sorted(body["response"] for body in sent) == ["41", "42"]
    assert sent[0]["messages"] == list(PROBLEM.messages) and sent[0]["index"] == 3
    assert sent[0]["metadata"] == {"when": "b'1'", "level": None, "range": [1.5, None]}
    assert not sent[0]["truncated"]


def test_the_service_is_told_that_a_response_was_cut():
    with service(lambda body: (200, {"reward": 0.0})) as (url, sent), RemoteReward(reward(url)) as rewards:
        rewards.submit("42", PROBLEM, truncated=True).result()
    assert sent[0]["truncated"]


def test_a_service_that_stumbles_is_asked_again():
    replies = iter([(503, b"starting"), (429, b"slow down"), (200, {"reward": 0.5})])
    with service(lambda _: next(replies)) as (url, sent), RemoteReward(reward(url)) as rewards:
        assert rewards.submit("42", PROBLEM).result() == Verdict(0.5)
    assert len(sent) == 3


@pytest.mark.parametrize(
    "reply, reason",
    [
        ((400, b"no such problem"), "answered HTTP 400: no such problem"),
        ((200, b"fine"), "gave no reward: fine"),
        ((200, {"score": 1}), "gave no reward"),
        ((200, {"reward": "1"}), "gave '1', not a finite number"),
        ((200, b'{"reward": NaN}'), "not a finite number"),
        ((200, {"reward": True}), "gave True"),
    ],
)
def test_what_is_wrong_with_one_sample_costs_that_sample(reply, reason):
    with service(lambda _: reply) as (url, sent), RemoteReward(reward(url)) as rewards:
        verdict = rewards.submit("42", PROBLEM).result()
    assert verdict.reward == 0.0 and verdict.error is not None and reason in verdict.error
    assert len(sent) == 1


def test_a_service_that_stays_away_ends_the_run_and_is_named():
    with (
        service(lambda _: (503, b"")) as (url, _),
        RemoteReward(reward(url)) as rewards,
        pytest.raises(PmdError, match=r"service http.*failed 3 times on problem 3; last failure: HTTP 503"),
    ):
        rewards.submit("42", PROBLEM).result()
    with (
        RemoteReward(reward("http://127.0.0.1:9/")) as rewards,
        pytest.raises(PmdError, match="ConnectError"),
    ):
        rewards.submit("42", PROBLEM).result()


def test_a_service_that_fails_is_not_asked_again_when_the_run_ends(monkeypatch):
    monkeypatch.setattr(service_module, "RETRY_PAUSE_SECONDS", 60)
    asked = threading.Event()

    def failing(_: dict[str, Any]) -> Reply:
        asked.set()
        return 503, b"busy"

    with service(failing) as (url, sent):
        with RemoteReward(reward(url)) as rewards:
            verdict = rewards.submit("42", PROBLEM)
            assert asked.wait(10)
        with pytest.raises(PmdError, match="failed 1 times"):
            verdict.result(0)
    assert len(sent) == 1


def test_a_service_that_does_not_answer_in_time_is_named_with_its_deadline():
    waiting = threading.Event()
    with service(lambda _: (200, {"reward": float(waiting.wait(10))})) as (url, _):
        with (
            RemoteReward(reward(url, seconds=0.1)) as rewards,
            pytest.raises(PmdError, match=r"_seconds=0\.1"),
        ):
            rewards.submit("42", PROBLEM).result()
        waiting.set()


def test_a_remote_reward_needs_a_service_and_only_it_has_one():
    with pytest.raises(ConfigError, match=r"reward\.name=remote needs reward\.remote\.url"):
        Reward(name="remote")
    with pytest.raises(ConfigError, match=r"reward\.name is 'exact', which does not use it"):
        Reward(name="exact", remote=Service(url="http://here/"))
    with pytest.raises(ValueError, match="url"):
        Service(url="here:80")


def test_other_rewards_are_graded_in_processes():
    assert isinstance(grading(Reward(name="exact")), RewardPool)
