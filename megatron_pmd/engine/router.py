"""The sglang router before all engines of a run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_pmd.config import Rollout
from megatron_pmd.engine.server import (
    LOOPBACK,
    ServerProcess,
    answers,
    free_port,
    inherited_environment,
    port_was_taken,
    write_arguments,
)
from megatron_pmd.errors import EngineError

MARGIN_SECONDS = 60
"""By which the router's deadline for a request is longer than the clients'."""
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class RouterSpec:
    engines: Sequence[str]
    """Base URL of every engine; they must be ready before the router starts."""
    port: int
    log: Path
    request_timeout_seconds: float
    """The clients' own deadline; the router's is a minute longer."""
    host: str = LOOPBACK
    api_key: str | None = None
    """The engines' key."""
    policy: str = "round_robin"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


START_ROUTER = """
import argparse, json, sys
from setproctitle import setproctitle
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs

setproctitle("sglang::router")
parser = argparse.ArgumentParser()
RouterArgs.add_cli_args(parser)
Router.from_args(RouterArgs.from_cli_args(parser.parse_args(json.load(open(sys.argv[1]))))).start()
"""
"""As `python -m sglang_router.launch_router`, which can be told its API key only on the command line.

That module also imports the balancer in Python (mini_lb.py), and with it SGLang, torch and transformers: 8 s
of a core that every start of a run, and every replacement of an engine, would wait for.
"""


class RouterProcess(ServerProcess):
    """The router as a child process; when an engine is started again, so is the router."""

    def __init__(self, spec: RouterSpec) -> None:
        """Starts the router and returns at once."""
        self.spec = spec
        options: dict[str, Any] = {
            "host": spec.host,
            "port": spec.port,
            "policy": spec.policy,
            # Of `manual` alone: a conversation's first request goes where the fewest are in flight.
            "assignment-mode": "min_load",
            # The client gives up first: ten requests that time out *here* close the engine to all others.
            "request-timeout-secs": int(spec.request_timeout_seconds) + MARGIN_SECONDS,
            # A dead engine is closed to requests after 10 of them failed (they are retried elsewhere), or two
            # checks.
            "cb-timeout-duration-secs": 10,
            "health-check-interval-secs": 5,
            # An engine with a thousand new requests may take 5 s to say it is well.
            "health-check-timeout-secs": 20,
            "health-failure-threshold": 2,
            "health-success-threshold": 1,
            "worker-startup-check-interval": 1,
            # Its default, port 29000 on all interfaces, collides with a second run on the node.
            "prometheus-host": LOOPBACK,
            "prometheus-port": free_port(),
            "log-level": "warn",
        }
        if spec.api_key is not None:
            options["api-key"] = spec.api_key
        arguments = ["--worker-urls", *spec.engines]
        arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        file = spec.log.with_name(spec.log.name + ".json")
        write_arguments(file, arguments)
        command = [sys.executable, "-c", START_ROUTER, str(file)]
        hosts = [host for url in spec.engines if (host := urlsplit(url).hostname)]
        super().__init__("router", command, inherited_environment(hosts), spec.url, "/readiness", spec.log)


class Router:
    """A run's router, on the driver: started before a rollout, and again when it or an engine was lost."""

    def __init__(self, rollout: Rollout, log: Path, api_key: str | None) -> None:
        """Starts nothing yet. api_key: the engines'."""
        self._rollout, self._log, self._api_key = rollout, log, api_key
        self.process: RouterProcess | None = None

    @property
    def url(self) -> str:
        """Where requests go; while there is a router."""
        assert self.process is not None, "the router is not started yet"
        return self.process.url

    def start(self, engines: Sequence[str]) -> None:
        """Start it before these engines (URLs) unless it answers; EngineError if it does not come up."""
        if self._answers():
            return
        self.stop()
        for attempt in itertools.count():
            spec = RouterSpec(
                engines=engines,
                port=free_port(),
                log=self._log,
                request_timeout_seconds=self._rollout.request_timeout_seconds,
                api_key=self._api_key,
                policy=self._rollout.router_policy,
            )
            self.process = RouterProcess(spec)
            try:
                return self.process.wait_ready(self._rollout.start_timeout_seconds)
            except EngineError as error:
                self.stop()
                if attempt == self._rollout.restarts or not port_was_taken(str(error)):
                    raise

    def _answers(self) -> bool:
        """Whether there is one that lives and answers: its supervisor outlives it for a moment."""
        if self.process is None or not self.process.alive():
            return False
        return answers(f"{self.url}/liveness", ANSWER_SECONDS)

    def reaches(self, engines: Sequence[str]) -> bool:
        """Whether it answers, where there is one, and the server of at least one of these engines does."""
        if self.process is not None and not self._answers():
            return False
        return any_answers(engines)

    def stop(self) -> None:
        """End it; also when an engine was replaced: its picture of who is alive is out of date."""
        if self.process is not None:
            self.process.stop()
            self.process = None


def any_answers(engines: Sequence[str]) -> bool:
    """Whether the server of at least one of these engines (URLs) does."""
    return any(answers(url + "/health", ANSWER_SECONDS) for url in engines)


def reaches(router: str, engines: Sequence[str]) -> bool:
    """Whether another process's router (URL) answers, and one of the engines behind it."""
    return answers(f"{router}/liveness", ANSWER_SECONDS) and any_answers(engines)
