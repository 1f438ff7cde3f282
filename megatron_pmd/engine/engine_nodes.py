"""Engines on nodes of their own (layout.engine_nodes): how a run and these nodes find each other.

They meet in the run's folder, which all of them see. In `engines/run.json` the driver says what to start and
with which keys, for this user alone. In `engines/node-N.json` node N says where its engines are: at once, and
again whenever it has started one anew or given one up. In `engines/lost-N.json` the rank that leads engine N
says that it does not answer there; its node then starts it again.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_pmd.engine.external import ExternalEngine
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.server import POLL_SECONDS, answers
from megatron_pmd.engine.sglang_server import READY_PATH, EngineSpec
from megatron_pmd.errors import EngineError
from megatron_pmd.files import JsonObject, read_object, write_whole
from megatron_pmd.waiting import waiting_for

START = "PMD_START"
"""Environment variable that names this start of a run, for its ranks and for the engine nodes that were
started with them: what another start has left in the folder is not taken for this one's. A node without it,
which somebody has added, serves whatever start there is."""
PATIENT_UPDATES = 2
"""So often an engine that was left out may answer without generating before its node is told."""


def this_start() -> str | None:
    """That of this process, as START says; None: it says nothing."""
    return os.environ.get(START)


@dataclass(frozen=True)
class Opening:
    """What a start of the run asks its engine nodes for."""

    config: dict[str, Any]
    keys: Keys
    driver: str
    """Address of the driver's node: engines listen on the interface towards it."""
    host: str = field(default_factory=socket.gethostname)
    """The driver's."""
    folder: str = field(default_factory=os.getcwd)
    """The driver's working directory: relative paths of the configuration begin there."""
    start: str = field(default_factory=lambda: this_start() or "")
    """See START."""
    software: dict[str, Any] = field(default_factory=dict)
    """Versions and commit of the driver; a node has the same."""


class Meeting:
    """The files in which a run and its engine nodes tell each other what they need to know."""

    def __init__(self, run: Path, start: str | None = None) -> None:
        """start: which one's nodes and engines are told of, and asked for; None: this process's."""
        self._folder = run / "engines"
        self._start = (this_start() or "") if start is None else start
        self._known: dict[str, JsonObject | None] = {}

    def open(self, opening: Opening) -> None:
        """The driver's: have the nodes start their engines, anew if they have some of an earlier start."""
        # who could write here could have engines, and their calls, go to an address of his
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self._folder / "run.json", json.dumps(asdict(opening)), mode=0o600)

    def close(self) -> None:
        """The driver's: the nodes end."""
        (self._folder / "run.json").unlink(missing_ok=True)

    def opening(self, start: str | None = None) -> Opening | None:
        """None: no run wants engines now. start: only of this start of it (START)."""
        found = self._read("run.json")
        if found is None or start not in (None, found["start"]):
            return None
        return Opening(**(found | {"keys": Keys(**found["keys"])}))

    def announce(self, node: int, urls: Mapping[int, str], failures: Mapping[int, str], agent: str) -> None:
        """A node's: where each of its engines is, or why it does not come up.

        agent: names the process that keeps them.
        """
        told = {
            "start": self._start, "agent": agent,
            "urls": {str(number): url for number, url in urls.items()},
            "failures": {str(number): words for number, words in failures.items()},
        }  # fmt: skip
        write_whole(self._folder / f"node-{node}.json", json.dumps(told), mode=0o600)

    def announced(self, node: int, engine: int) -> str | None:
        """Where the engine is; None: nowhere, or it was lost there."""
        url: str | None = self._told(node).get("urls", {}).get(str(engine))
        return None if url == self.lost(engine) else url

    def failure(self, node: int, engine: int) -> str | None:
        """Why the engine does not come up; None: it still may."""
        words: str | None = self._told(node).get("failures", {}).get(str(engine))
        return words

    def keeper(self, node: int) -> str | None:
        """Who keeps the node's engines, as announce() says."""
        agent: str | None = self._told(node).get("agent")
        return agent

    def _told(self, node: int) -> JsonObject:
        told = self._read(f"node-{node}.json")
        return told if told is not None and told["start"] == self._start else {}

    def tell_lost(self, engine: int, url: str) -> None:
        """A leader's: the engine does not answer there."""
        with suppress(OSError):  # then it stays lost to its leader alone
            write_whole(self._folder / f"lost-{engine}.json", json.dumps({"url": url}))

    def lost(self, engine: int) -> str | None:
        """Where the engine did not answer."""
        return (self._read(f"lost-{engine}.json") or {}).get("url")

    def _read(self, name: str) -> JsonObject | None:
        """What stands in a file; what stood there last, while the file system does not answer."""
        with suppress(OSError):
            self._known[name] = read_object(self._folder / name)
        return self._known.get(name)


class AnnouncedEngine(ExternalEngine):
    """In the place of an EngineProcess: an engine that its node starts, and starts again elsewhere."""

    def __init__(self, spec: EngineSpec, node: int, meeting: Meeting) -> None:
        """spec: host and port are filled in as soon as its node tells them."""
        self._node, self._meeting = node, meeting
        self._answered, self._silent = False, 0
        super().__init__(spec)
        self.url = ""
        self.find()

    def find(self) -> None:
        """Look where its node has it now; until that tells, it stays where it was."""
        url = self._meeting.announced(self._node, self.spec.number)
        if url and url != self.url:
            address = urlsplit(url)
            self.spec = replace(self.spec, host=address.hostname or "", port=address.port or 0)
            self.url = url

    def alive(self) -> bool:
        here = self._meeting.announced(self._node, self.spec.number) == self.url
        found = bool(self.url) and here and super().alive()
        self._answered |= found
        return found

    def wait_ready(self, deadline_seconds: float) -> None:
        """See ExternalEngine; with CUDA an engine that has told where it is may compile kernels first."""
        started, cold = time.monotonic(), self.spec.rollout.cold_start_timeout_seconds
        with waiting_for(self._where, max(deadline_seconds, 0.0 if self.spec.cpu else cold)):
            while not (self.url and answers(self.url + READY_PATH, 5.0)):
                failure = self._meeting.failure(self._node, self.spec.number)
                if failure is not None:
                    raise EngineError(f"{self._where()} does not come up: {failure}")
                limit = deadline_seconds if self.spec.cpu or not self.url else max(cold, deadline_seconds)
                if (waited := time.monotonic() - started) > limit:
                    raise EngineError(f"{self._where()} did not answer for {waited:.0f} s; log: {self.log}")
                time.sleep(POLL_SECONDS)
                self.find()
        self._answered = True

    def stop(self) -> None:
        """Have its node start it again, unless it has done so already, or it has never been there."""
        if self._answered:
            self._meeting.tell_lost(self.spec.number, self.url)

    def note_silence(self) -> None:
        """It answers, but generates nothing; seen again at the next update, its node is told."""
        self._silent += 1
        if self._silent >= PATIENT_UPDATES:
            self.stop()

    def _where(self) -> str:
        place = self.url or "which has not told where it is"
        return f"engine {self.spec.number} on engine node {self._node} ({place})"
