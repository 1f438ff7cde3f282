"""Servers that others started: what a run finds them in, and gets them out of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from megatron_pmd.engine.external import ExternalEngine
from megatron_pmd.engine.keys import NO_KEYS, Keys
from megatron_pmd.errors import EngineError
from tests.engine.live_engine import spec_for
from tools.bench.stub_engine import StubEngine, serving


class LeftPaused(StubEngine):
    """As SGLang's server is that a run has paused: it answers /health, and generates nothing."""

    admin_key = "admin"

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health_generate)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._goes_on.is_set() else 503)

    async def go_on(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.admin_key}":
            return web.Response(status=401)
        return await super().go_on(request)


@pytest.mark.parametrize("paused", [True, False])
def test_a_server_that_a_killed_run_has_left_paused_generates_again(tmp_path: Path, paused: bool) -> None:
    server = LeftPaused()
    with serving(server) as url:
        if paused:
            server._goes_on.clear()
        address = urlsplit(url)
        spec = replace(
            spec_for(tmp_path, tmp_path), host=str(address.hostname), port=address.port or 0,
            keys=Keys("generate", server.admin_key),
        )  # fmt: skip
        if paused:
            with pytest.raises(EngineError, match="did not answer"):
                ExternalEngine(replace(spec, keys=NO_KEYS)).wait_ready(0.1)
        ExternalEngine(spec).wait_ready(10)
