"""Engines on nodes of their own (layout.engine_nodes): how a run and these nodes find each other.

They meet in the run's folder, which all of them see. In `engines/run.json` the driver says what to start and
with which keys, for this user alone. In `engines/node-N.json` node N says where its engines are: at once, and
again whenever it has started one anew. In `engines/lost-N.json` the rank that leads engine N says that it
does not answer there; its node then starts it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_pmd.engine.external import ExternalEngine
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.server import POLL_SECONDS, answers
from megatron_pmd.engine.sglang_server import EngineSpec
from megatron_pmd.errors import EngineError
from megatron_pmd.files import read_object, write_whole
from megatron_pmd.waiting import waiting_for


@dataclass(frozen=True)
class Opening:
    """What a start of the run asks its engine nodes for."""

    config: dict[str, Any]
    keys: Keys
    driver: str
    """Address of the driver's node: engines listen on the interface towards it."""


class Meeting:
    """The files in which a run and its engine nodes tell each other what they need to know."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "engines"

    def open(self, opening: Opening) -> None:
        """The driver's: have the nodes start their engines, anew if they have some of an earlier start."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / "run.json", json.dumps(asdict(opening)), mode=0o600)

    def close(self) -> None:
        """The driver's: the nodes end."""
        (self._folder / "run.json").unlink(missing_ok=True)

    def opening(self) -> Opening | None:
        """None: no run wants engines now."""
        found = read_object(self._folder / "run.json")
        return Opening(found["config"], Keys(**found["keys"]), found["driver"]) if found else None

    def announce(self, node: int, keys: Keys, urls: Mapping[int, str]) -> None:
        """A node's: where each of its engines is. keys: those that they were started with."""
        told = {"start": _start(keys), "urls": {str(number): url for number, url in urls.items()}}
        write_whole(self._folder / f"node-{node}.json", json.dumps(told), mode=0o600)

    def announced(self, node: int, engine: int, keys: Keys) -> str | None:
        """Where the engine is that was started with these keys; None: nowhere, or it was lost there."""
        told = read_object(self._folder / f"node-{node}.json")
        if told is None or told["start"] != _start(keys):
            return None
        url: str | None = told["urls"].get(str(engine))
        return url if url is None or url != self.lost(engine) else None

    def tell_lost(self, engine: int, url: str) -> None:
        """A leader's: the engine does not answer there."""
        with suppress(FileNotFoundError):  # the run has never been opened
            write_whole(self._folder / f"lost-{engine}.json", json.dumps({"url": url}))

    def lost(self, engine: int) -> str | None:
        """Where the engine did not answer."""
        return (read_object(self._folder / f"lost-{engine}.json") or {}).get("url")


def _start(keys: Keys) -> str:
    """Names the start of a run that these keys belong to, and gives none of them away."""
    return hashlib.blake2b(f"{keys.api}".encode(), digest_size=8).hexdigest()


class AnnouncedEngine(ExternalEngine):
    """In the place of an EngineProcess: an engine that its node starts, and starts again elsewhere."""

    ready_path = "/ready"

    def __init__(self, spec: EngineSpec, node: int, meeting: Meeting) -> None:
        """spec: host and port are filled in as soon as its node tells them."""
        self._node, self._meeting = node, meeting
        super().__init__(spec)
        self.url = ""
        self.find()

    def find(self) -> None:
        url = self._meeting.announced(self._node, self.spec.number, self.spec.keys)
        if url and url != self.url:
            address = urlsplit(url)
            self.spec = replace(self.spec, host=address.hostname or "", port=address.port or 0)
            self.url = url

    def alive(self) -> bool:
        here = self._meeting.announced(self._node, self.spec.number, self.spec.keys) == self.url
        return bool(self.url) and here and super().alive()

    def wait_ready(self, deadline_seconds: float) -> None:
        """See ExternalEngine; with CUDA an engine that has told where it is may compile kernels first."""
        started, cold = time.monotonic(), self.spec.rollout.cold_start_timeout_seconds
        with waiting_for(self._where, max(deadline_seconds, 0.0 if self.spec.cpu else cold)):
            while not (self.url and answers(self.url + self.ready_path, 5.0)):
                limit = deadline_seconds if self.spec.cpu or not self.url else max(cold, deadline_seconds)
                if (waited := time.monotonic() - started) > limit:
                    raise EngineError(f"{self._where()} did not answer for {waited:.0f} s; log: {self.log}")
                time.sleep(POLL_SECONDS)
                self.find()

    def stop(self) -> None:
        """Have its node start it again, unless it has done so already."""
        if self.url:
            self._meeting.tell_lost(self.spec.number, self.url)

    def _where(self) -> str:
        place = self.url or "which has not told where it is"
        return f"engine {self.spec.number} on engine node {self._node} ({place})"
