"""SGLang servers that others started (rollout.servers): called, but never started, emptied or ended."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.server import POLL_SECONDS, answers
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import EngineError
from megatron_pmd.waiting import waiting_for

KEY, ADMIN_KEY = "PMD_SERVER_KEY", "PMD_SERVER_ADMIN_KEY"
"""Environment variables with the servers' `--api-key` and `--admin-api-key`; unset: they have none."""
ANSWER_SECONDS = 30.0
"""SGLang's /health has the server generate a token, unless it was started otherwise."""


def keys() -> Keys:
    """Of the servers, as the environment says."""
    return Keys(os.environ.get(KEY), os.environ.get(ADMIN_KEY))


class ExternalEngine:
    """In the place of an EngineProcess. One that is lost is waited for, and given the current weights."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.url, self.log = spec, spec.url, spec.log

    def alive(self) -> bool:
        return answers(self.url + "/health", ANSWER_SECONDS)

    def wait_ready(self, deadline_seconds: float) -> None:
        """Block until the server generates; EngineError at the deadline."""
        started = time.monotonic()
        with waiting_for(self._where(), deadline_seconds), EngineControl(self.spec, ANSWER_SECONDS) as calls:
            while not _generates(calls):
                if (waited := time.monotonic() - started) > deadline_seconds:
                    raise EngineError(f"{self._where()} did not answer for {waited:.0f} s; is it running?")
                time.sleep(POLL_SECONDS)

    def check_alive(self) -> None:
        if not self.alive():
            raise EngineError(f"{self._where()} does not answer")

    def stop(self) -> None:
        """It is not ours to end."""

    def _where(self) -> str:
        return f"server {self.spec.number} of rollout.servers ({self.url})"


def _generates(calls: EngineControl) -> bool:
    with suppress(EngineError):
        calls.go_on()  # a run that died in an update has left it paused, and it would answer no request
    return calls.generates(ANSWER_SECONDS)


Engine = EngineProcess | ExternalEngine
