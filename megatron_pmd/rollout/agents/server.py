"""The endpoint that programs talk to: one server in the driver's loop, an address for each episode."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from megatron_pmd.rollout.agents.conversations import AgentEpisode
from megatron_pmd.rollout.agents.protocol import MODEL, ChatRequest, RequestError
from megatron_pmd.rollout.trajectory import Turn

REQUEST_BYTES = 64 * 2**20
"""Longest request."""
BACKLOG = 65535
"""Connections that wait to be accepted: thousands of programs may begin at once."""
CLOSING_SECONDS = 1.0


@dataclass(frozen=True)
class Address:
    """Where a program finds its model."""

    base_url: str
    api_key: str


class AgentServer:
    """`async with AgentServer() as server`; it listens on this machine only."""

    def __init__(self) -> None:
        self._episodes: dict[str, tuple[str, AgentEpisode]] = {}
        self._numbers = itertools.count()

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=REQUEST_BYTES, middlewares=[_answering_errors])
        app.router.add_post("/{episode}/v1/chat/completions", self._complete)
        app.router.add_get("/{episode}/v1/models", self._models)
        # a program that hangs up has no use for its answer: the engine's request ends with the handler
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=CLOSING_SECONDS
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=BACKLOG).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @contextmanager
    def serving(self, episode: AgentEpisode) -> Iterator[Address]:
        """An endpoint of its own, as long as this lasts."""
        name, key = str(next(self._numbers)), secrets.token_urlsafe(24)
        self._episodes[name] = key, episode
        try:
            yield Address(f"http://127.0.0.1:{self._port}/{name}/v1", key)
        finally:
            del self._episodes[name]

    def _episode(self, request: web.Request) -> AgentEpisode:
        key, episode = self._episodes.get(request.match_info["episode"], ("", None))
        if episode is None:
            raise RequestError("this episode has ended", status=410, code="episode_ended")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError("the key is not this episode's", status=401, code="invalid_api_key")
        return episode

    async def _models(self, request: web.Request) -> web.Response:
        self._episode(request)
        listed = [{"id": MODEL, "object": "model", "created": 0, "owned_by": "megatron-pmd"}]
        return web.json_response({"object": "list", "data": listed})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        episode = self._episode(request)
        try:
            body = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        asked = ChatRequest.read(body)
        answer, turn = await episode.answer(asked)
        if not asked.stream:
            return web.Response(body=orjson.dumps(answer.body()), content_type="application/json")
        events = answer.events(include_usage=asked.include_usage)
        return await _streamed(request, events, episode, turn)


async def _streamed(
    request: web.Request, events: Iterator[bytes], episode: AgentEpisode, turn: Turn
) -> web.StreamResponse:
    stream = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "Connection": "close"}
    )
    delivered = False
    try:
        await stream.prepare(request)
        for event in events:
            await stream.write(event)
        await stream.write_eof()
        delivered = True
    finally:
        if not delivered:
            episode.note_undelivered(turn)
    return stream


@web.middleware
async def _answering_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in OpenAI's form, which its clients show whole."""
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except RequestError as error:
        return web.json_response(error.body(), status=error.status)
    except web.HTTPException as error:
        said = f"{request.method} {request.path}: {error.reason}; POST …/chat/completions is what there is"
        return web.json_response(RequestError(said, status=error.status).body(), status=error.status)
