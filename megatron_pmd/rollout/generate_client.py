"""Requests to the engines over HTTP: how many at a time, again where an engine failed one, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from megatron_pmd.errors import EngineError, EnginesLost, RequestRefused
from megatron_pmd.processes import connections_possible
from megatron_pmd.rollout.engine_answer import EngineAnswer, parse_answer

RETRY_PAUSE_SECONDS = 1.0
"""Before the first repetition of a request; doubled for each further one."""
ABORT_PAUSE_SECONDS = 0.5
"""Between two calls to abort: a request may have been on its way while the first was answered."""
ABORT_TIMEOUT_SECONDS = 10.0
ROUTING_KEY = "X-SMG-Routing-Key"
"""Requests of one key go to one engine under the router's policy `manual`; others do not look at it."""


class _Failed(Exception):
    """One attempt at a request, which another may mend."""


class ResponseStopped(BaseException):
    """The rollout ends before this response does; no Exception, so that no rollout function eats it."""


@dataclass(frozen=True)
class Endpoint:
    """Where the engines are, and how patient to be with them."""

    router_url: str
    engine_urls: Sequence[str]
    """Each engine's own: the router passes no aborts on."""
    headers: dict[str, str]
    request_timeout_seconds: float
    retries: int
    any_engine_alive: Callable[[], bool]
    max_in_flight: int | None = None
    """Requests sent at one time; their deadline runs only then. None: as many as files can be open."""
    keeps_cache: bool = False
    """An update leaves the engines' KV cache as it is (rollout.pause=in_place)."""
    abort_headers: dict[str, str] = field(default_factory=dict)
    """In place of headers where an engine takes an abort only from who may change it."""

    @property
    def slots(self) -> int:
        """Requests that can be sent at one time."""
        possible = connections_possible()
        return min(self.max_in_flight or possible, possible)


class GenerateClient:
    """One rollout's requests to the engines: `async with GenerateClient(endpoint) as client`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._slots = asyncio.Semaphore(endpoint.slots)
        self._asking, self._questions = asyncio.Lock(), 0
        self._asked, self._alive = -RETRY_PAUSE_SECONDS, True
        self.stopping: str | None = None
        """Why no further request is sent."""
        self.stopped = asyncio.Event()
        """Set with it: see unless_stopped()."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.endpoint.request_timeout_seconds),
            connector=aiohttp.TCPConnector(limit=0),
            headers=self.endpoint.headers | {"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, request: dict[str, Any], routing_key: str) -> EngineAnswer:
        """The answer to one request. Its finish reason is `stop`, `length` or, after stop(), `abort`.

        Raises ResponseStopped after stop() if nothing was answered, RequestRefused where asking again would
        not help, EnginesLost when no engine is left, EngineError when the request fails `retries` times on
        engines that are alive.
        """

        async def attempt() -> EngineAnswer:
            url, headers = self.endpoint.router_url + "/generate", {ROUTING_KEY: routing_key}
            answer = parse_answer(await self._post(url, request, headers))
            reason = answer.finish_reason
            if reason["type"] in ("stop", "length") or (self.stopping and reason["type"] == "abort"):
                return answer
            raise _Failed(f"finish reason {reason}")

        return await self._retried(attempt)

    async def ask(self, path: str, question: dict[str, Any]) -> Any:
        """What one of the engines answers to something that all of them know, asked directly.

        The router has not all of their addresses. Raises what generate() raises, but EngineError for a
        refusal: the response that is asked about is there.
        """
        urls = self.endpoint.engine_urls or [self.endpoint.router_url]

        async def attempt() -> Any:
            self._questions += 1
            return orjson.loads(await self._post(urls[self._questions % len(urls)] + path, question))

        try:
            return await self._retried(attempt)
        except RequestRefused as refusal:
            raise EngineError(f"{path}: {refusal}") from None

    async def _retried[T](self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What an attempt gives, the first one that does not fail; see generate()."""
        failure = ""
        for number in range(self.endpoint.retries + 1):
            try:
                async with self._slots:
                    if self.stopping:
                        raise ResponseStopped(self.stopping)
                    return await attempt()
            except _Failed as error:
                failure = str(error)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
            if self.stopping:
                raise ResponseStopped(self.stopping)
            await asyncio.sleep(RETRY_PAUSE_SECONDS * 2**number)
            if not await self._any_alive():
                raise EnginesLost(f"no engine answers any more; last failure: {failure}")
        raise EngineError(f"a request failed {self.endpoint.retries + 1} times; last failure: {failure}")

    async def _post(self, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
        async with self._session.post(url, data=orjson.dumps(body), headers=headers) as reply:
            if reply.status == 200:
                return await reply.read()
            if reply.status == 400:
                raise RequestRefused(f"the engine refuses a request: {(await reply.text())[:500]}")
            raise _Failed(f"HTTP {reply.status}: {(await reply.text())[:200]}")

    async def _any_alive(self) -> bool:
        """Asked once for all requests that fail together."""
        async with self._asking:
            if time.monotonic() - self._asked >= RETRY_PAUSE_SECONDS:
                self._alive = await asyncio.to_thread(self.endpoint.any_engine_alive)
                self._asked = time.monotonic()
            return self._alive

    async def unless_stopped[T](self, wanted: Awaitable[T]) -> T:
        """What is wanted once it is there; ResponseStopped, and it is cancelled, if the end comes first."""
        waiting = asyncio.ensure_future(wanted)
        stopped = asyncio.ensure_future(self.stopped.wait())
        try:
            await asyncio.wait([waiting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ResponseStopped(self.stopping)
            return waiting.result()
        finally:
            waiting.cancel()
            stopped.cancel()

    def send_nothing_more(self, reason: str) -> None:
        """The rollout ends."""
        self.stopping = reason
        self.stopped.set()

    async def stop(self, reason: str, idle: asyncio.Event) -> None:
        """Send nothing more, and have the engines answer what they are working on; until `idle` is set.

        A dead engine is not waited for: its requests fail by themselves.
        """
        self.send_nothing_more(reason)
        while not idle.is_set():
            await asyncio.gather(*(self._abort(url) for url in self.endpoint.engine_urls))
            try:
                async with asyncio.timeout(ABORT_PAUSE_SECONDS):
                    await idle.wait()
            except TimeoutError:
                continue

    async def _abort(self, engine_url: str) -> None:
        body = orjson.dumps({"abort_all": True})
        try:
            url, patience = engine_url + "/abort_request", aiohttp.ClientTimeout(total=ABORT_TIMEOUT_SECONDS)
            async with self._session.post(
                url, data=body, timeout=patience, headers=self.endpoint.abort_headers
            ) as reply:
                if reply.status != 200:
                    raise EngineError(
                        f"{engine_url} answered /abort_request with status {reply.status}: "
                        f"{(await reply.text())[:200]}"
                    )
        except (aiohttp.ClientError, TimeoutError):
            return
