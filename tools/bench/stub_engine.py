"""A server that answers as an engine would, without a model: for tests of the driver, and its benchmarks.

    python -m tools.bench.stub_engine '{"median_tokens": 400, "sigma": 1.0, "tokens_per_second": 100}'

prints its port and serves until its standard input is closed. The response to a sampling seed is always the
same tokens, so one that is stopped and continued must come out as the one that never was.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvloop
from aiohttp import web

STOP_TOKEN = 2


@dataclass(eq=False)
class _Decoding:
    """One request that is worked on."""

    version: str
    """Of the weights it is decoded under."""
    made: int = 0
    """Tokens until the last pause."""
    versions: list[tuple[int, str]] = field(default_factory=list)
    """(tokens made by then, earlier version), at each change."""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    def spans(self, made: int) -> list[dict[str, Any]]:
        """As SGLang's meta_info has them."""
        spans: list[dict[str, Any]] = []
        for end, version in [*self.versions, (made, self.version)]:
            start = spans[-1]["end"] if spans else 0
            if end > start or (not spans and end == made):
                spans.append({"version": version, "start": start, "end": end})
        return spans


@dataclass
class StubEngine:
    """Responses of log-normal length at a constant speed each, at most `slots` of them at one time."""

    median_tokens: float = 20.0
    sigma: float = 0.5
    """Of the logarithm of the length."""
    tokens_per_second: float = 1000.0
    """Of one response, however many there are."""
    slots: int = 1_000_000
    prompt_tokens: int = 2
    """Of every prompt; what follows is a response that is continued."""
    whole_turns: bool = False
    """Every request is a response of its own length, whatever stands before it: an agent's turn."""
    weight_version: str = "0"
    failures: int = 0
    """So many requests are answered with status 503 first."""
    decoded_tokens: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    """All there were, if keep_requests."""
    keep_requests: bool = False
    routing_keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.slots)
        self._running: set[_Decoding] = set()
        self._paused, self._goes_on = asyncio.Event(), asyncio.Event()
        self._goes_on.set()

    @property
    def running(self) -> int:
        """Requests that it works on, or that wait for a slot."""
        return len(self._running)

    def length(self, seed: int) -> int:
        """Tokens of the whole response to this seed, its stop token included."""
        return response_length(seed, self.median_tokens, self.sigma)

    def token(self, seed: int, position: int) -> int:
        if position == self.length(seed) - 1:
            return STOP_TOKEN
        return 3 + (seed * 31 + position * position * 7) % 997

    async def generate(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if self.keep_requests:
            self.requests.append(body)
            self.routing_keys.append(request.headers.get("X-SMG-Routing-Key", ""))
        if self.failures:
            self.failures -= 1
            return web.Response(status=503, text="busy")
        sampling = body["sampling_params"]
        seed = sampling["sampling_seed"]
        done = 0 if self.whole_turns else len(body["input_ids"]) - self.prompt_tokens
        left = self.length(seed) - done
        wanted = min(left, sampling["max_new_tokens"])
        decoding = _Decoding(self.weight_version)
        made, aborted = await self._decode(wanted, decoding)
        self.decoded_tokens += made
        tokens = [self.token(seed, done + i) for i in range(made)]
        finish = "abort" if aborted else "stop" if made == left else "length"
        information = {
            "weight_version": self.weight_version,
            "weight_versions": decoding.spans(made),
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-token / 1000, token, None] for token in tokens],
        }
        answer = {"output_ids": tokens, "meta_info": information}
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def _decode(self, tokens: int, decoding: _Decoding | None = None) -> tuple[int, bool]:
        """(tokens made, whether it was aborted)."""
        decoding = decoding or _Decoding(self.weight_version)
        self._running.add(decoding)
        acquired = asyncio.ensure_future(self._free.acquire())
        aborting = asyncio.ensure_future(decoding.aborted.wait())
        try:
            await asyncio.wait([acquired, aborting], return_when=asyncio.FIRST_COMPLETED)
            if not acquired.done():
                return 0, True
            try:
                return await self._made(tokens, decoding, aborting)
            finally:
                self._free.release()
        finally:
            self._running.discard(decoding)
            acquired.cancel()
            aborting.cancel()

    async def _made(
        self, tokens: int, decoding: _Decoding, aborting: asyncio.Future[Any]
    ) -> tuple[int, bool]:
        clock, left = asyncio.get_running_loop().time, tokens / self.tokens_per_second
        while left > 0 and not decoding.aborted.is_set():
            going_on = asyncio.ensure_future(self._goes_on.wait())
            await asyncio.wait([going_on, aborting], return_when=asyncio.FIRST_COMPLETED)
            going_on.cancel()
            begun, pausing = clock(), asyncio.ensure_future(self._paused.wait())
            await asyncio.wait([aborting, pausing], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            pausing.cancel()
            left -= clock() - begun
            decoding.made = min(tokens - 1, max(0, tokens - math.ceil(left * self.tokens_per_second)))
        if left > 0:
            return min(tokens, decoding.made + 1), True  # as SGLang, which ends the pass that is under way
        return tokens, False

    async def abort(self, request: web.Request) -> web.Response:
        if not orjson.loads(await request.read())["abort_all"]:
            return web.Response(status=400)
        for decoding in self._running:
            decoding.aborted.set()
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        self._goes_on.clear()
        self._paused.set()
        return web.Response()

    async def go_on(self, request: web.Request) -> web.Response:
        self._paused.clear()
        self._goes_on.set()
        return web.Response()

    async def set_version(self, request: web.Request) -> web.Response:
        for decoding in self._running:
            decoding.versions.append((decoding.made, self.weight_version))
        self.weight_version = orjson.loads(await request.read())["new_version"]
        for decoding in self._running:
            decoding.version = self.weight_version
        return web.json_response({"decoded_tokens": self.decoded_tokens})

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort)
        app.router.add_post("/update_weight_version", self.set_version)
        app.router.add_post("/pause_generation", self.pause)
        app.router.add_post("/continue_generation", self.go_on)

    async def start(self) -> int:
        """Serve on loopback, in the running loop; returns the port."""
        app = web.Application(client_max_size=1 << 30)
        self.routes(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=65535).start()
        return self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()


@functools.cache
def response_length(seed: int, median_tokens: float, sigma: float) -> int:
    normal = random.Random(seed).gauss(0.0, 1.0)
    return max(1, round(median_tokens * math.exp(sigma * normal)))


@contextmanager
def serving(engine: StubEngine) -> Iterator[str]:
    """The engine's URL, while it serves from a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(engine.start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(engine.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _main(settings: dict[str, Any]) -> None:
    print(await StubEngine(**settings).start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
