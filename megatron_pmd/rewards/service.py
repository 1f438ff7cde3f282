"""Rewards that a service gives over HTTP: one request a sample, sent again when the service fails."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import abstractmethod
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import httpx

from megatron_pmd.config import Reward, Service
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.threaded import ThreadedReward
from megatron_pmd.waiting import waiting_for

RETRY_PAUSE_SECONDS = 0.5
"""Before the first repetition of a request; doubled for each further one."""
SERVICE_FAILURES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that are not about the sample: the request is sent again."""
TOO_LONG = frozenset({400, 413, 422})
"""Answers of a model's server about one sample: it is too long for the model, most often."""
REMEMBERED = 100_000
"""Verdicts that are kept for requests which come again: 100 bytes or so each."""


class ServiceReward(ThreadedReward):
    """A client of a service. A reward of this kind says what it asks (`body`) and what an answer is worth.

    What the service says about a sample costs that sample: reward 0, with the reason. A service that cannot
    be reached after all retries ends the run: rewards of 0 would be trained on.
    """

    what: ClassVar[str]
    """The service, in messages."""
    repeatable: ClassVar[bool] = False
    """Whether the same request has the same answer, so that it is sent once."""
    about_a_sample: ClassVar[frozenset[int] | None] = None
    """Failures that cost the sample; each other one, as a wrong key's, ends the run. None: all that are
    answers."""

    def __init__(self, reward: Reward, service: Service, url: str) -> None:
        """url: what is posted to. ConfigError where the file of the service's key has none."""
        super().__init__(reward, service.max_in_flight)
        self.url, self._retries = url, service.retries
        key = read_key(service.key_file, f"reward.{reward.name}.key_file")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=service.max_in_flight)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.client = httpx.Client(
            timeout=reward.timeout_seconds, limits=limits, trust_env=False, headers=headers
        )
        self._verdicts: dict[bytes, Future[Verdict]] = {}
        self._door = threading.Lock()

    @abstractmethod
    def body(self, response: str, problem: Problem, truncated: bool) -> dict[str, Any]:
        """What is posted, as JSON."""

    @abstractmethod
    def verdict(self, answer: Any) -> Verdict:
        """What an answer of status 200 says, as JSON has it; whatever is not there or of another
        type raises LookupError, TypeError, AttributeError or ValueError."""

    def judge(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        # a data file's columns may hold what JSON has no word for, a date say
        content = json.dumps(self.body(response, problem, truncated), default=str, allow_nan=False)
        if not self.repeatable:
            return self._judged(content, problem)
        key = hashlib.sha256(content.encode()).digest()
        with self._door:
            known = self._verdicts.get(key)
            if known is None:
                mine = self._verdicts[key] = Future()
                if len(self._verdicts) > REMEMBERED:
                    del self._verdicts[next(iter(self._verdicts))]
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._judged(content, problem))
        except BaseException as error:
            mine.set_exception(error)
        return mine.result()

    def close(self) -> None:
        self.client.close()

    def _judged(self, content: str, problem: Problem) -> Verdict:
        with waiting_for(f"a verdict of the {self.what} {self.url}"):
            reply = self._reply(content, problem)
        if reply.status_code != 200:
            said = f"the {self.what} answered HTTP {reply.status_code}: {reply.text[:200]}"
            if self.about_a_sample is None or reply.status_code in self.about_a_sample:
                return Verdict(0.0, said)
            raise PmdError(
                f"{said}; {self.url} answers so to every sample: correct the settings of the reward"
            )
        try:
            return self.verdict(reply.json())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Verdict(0.0, f"the {self.what} gave no reward: {reply.text[:200]}")

    def _reply(self, content: str, problem: Problem) -> httpx.Response:
        failure = ""
        for attempt in range(self._retries + 1):
            try:
                reply = self.client.post(self.url, content=content)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code not in SERVICE_FAILURES:
                    return reply
                failure = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if attempt < self._retries and self.closing.wait(RETRY_PAUSE_SECONDS * 2**attempt):
                break  # nobody waits for the verdict
        raise PmdError(
            f"the {self.what} {self.url} failed {attempt + 1} times on problem "
            f"{problem.index}; last failure: {failure}; is it running, and is reward.timeout_seconds="
            f"{self.reward.timeout_seconds:g} enough?"
        )


def read_key(file: str | None, setting: str) -> str | None:
    """What the file holds: a key on a command line or in a configuration would be in the run's files.

    setting: its name, for the ConfigError where the file has none.
    """
    if file is None:
        return None
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error}") from None
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{setting}: {file} does not hold a key: one line of ASCII is expected")
    return key
