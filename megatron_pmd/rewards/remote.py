"""Reward `remote`: a service grades over HTTP, one request a sample, sent again when the service fails."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import PmdError
from megatron_pmd.rewards.graders import extract
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.waiting import waiting_for

RETRY_PAUSE_SECONDS = 0.5
"""Before the first repetition of a request; doubled for each further one."""
JSON = {"Content-Type": "application/json"}
SERVICE_FAILURES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that are not about the sample: the request is sent again."""


class RemoteReward:
    """A client of the service in reward.remote, with the interface of RewardPool.

    POST url, JSON {"response", "truncated", "answer", "messages", "metadata", "index"} -> JSON
    {"reward": number}. What the service says about a sample (another status, no number) costs that sample:
    reward 0, with the reason. A service that cannot be reached after all retries ends the run: rewards of 0
    would be trained on.
    """

    def __init__(self, reward: Reward) -> None:
        assert reward.remote is not None, "config.Reward sees to that"
        self._reward, self._remote = reward, reward.remote
        self._threads = ThreadPoolExecutor(reward.remote.max_in_flight, thread_name_prefix="remote-reward")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=reward.remote.max_in_flight)
        self._client = httpx.Client(timeout=reward.timeout_seconds, limits=limits, trust_env=False)
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def submit(self, response: str, problem: Problem, truncated: bool = False) -> Future[Verdict]:
        """Grade one sample in the background; the future holds PmdError if the service cannot be reached."""
        return self._threads.submit(self._grade, response, problem, truncated)

    def grade(self, items: list[tuple[str, Problem]]) -> list[Verdict]:
        """Grade (response, problem) pairs; the verdicts come in the same order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def _grade(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        body = {
            "response": extract(response, self._reward.answer),
            "truncated": truncated,
            "answer": problem.answer,
            "messages": list(problem.messages),
            "metadata": _finite(problem.metadata),
            "index": problem.index,
        }
        # a data file's columns may hold what JSON has no word for, a date say
        content = json.dumps(body, default=str, allow_nan=False)
        with waiting_for(f"a verdict of the reward service {self._remote.url}"):
            return self._asked(content, problem)

    def _asked(self, content: str, problem: Problem) -> Verdict:
        failure = ""
        for attempt in range(self._remote.retries + 1):
            try:
                reply = self._client.post(self._remote.url, content=content, headers=JSON)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code not in SERVICE_FAILURES:
                    return _verdict(reply)
                failure = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if attempt < self._remote.retries:
                self._closing.wait(RETRY_PAUSE_SECONDS * 2**attempt)
        raise PmdError(
            f"the reward service {self._remote.url} failed {self._remote.retries + 1} times on problem "
            f"{problem.index}; last failure: {failure}; is it running, and is reward.timeout_seconds="
            f"{self._reward.timeout_seconds:g} enough?"
        )


def _finite(value: Any) -> Any:
    """With null for a number that is not finite: it has no word in JSON, and strict services refuse NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value


def _verdict(reply: httpx.Response) -> Verdict:
    if reply.status_code != 200:
        return Verdict(0.0, f"the reward service answered HTTP {reply.status_code}: {reply.text[:200]}")
    try:
        value: Any = reply.json()["reward"]
    except (ValueError, KeyError, TypeError):
        return Verdict(0.0, f"the reward service gave no reward: {reply.text[:200]}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return Verdict(0.0, f"the reward service gave {value!r:.80}, not a finite number")
    return Verdict(float(value))
