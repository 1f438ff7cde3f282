"""How a run finds the engines on nodes of their own, also where they were started again."""

from __future__ import annotations

import dataclasses
import errno
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import override
from megatron_pmd.engine.engine_nodes import START, AnnouncedEngine, Meeting, Opening
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.engine.placement import EnginePart
from megatron_pmd.errors import ConfigError, EngineError, LayoutError
from megatron_pmd.observe.subphases import SubphaseClock
from recipes import recipe
from tests.engine.live_engine import spec_for

KEYS = Keys("api", "admin")
CONFIG = override(recipe("tiny_moe_overlap_cpu"), ["layout.engine_nodes=1", "sync.transport=broadcast"])


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class Silent(Answers):
    """Lives, and generates nothing."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()


def silent_server() -> AbstractContextManager[str]:
    return server(Silent)


@contextmanager
def server(kind: type[BaseHTTPRequestHandler] = Answers) -> Iterator[str]:
    """The address of something that answers."""
    served = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        served.server_close()


@pytest.fixture
def meeting(tmp_path: Path) -> Meeting:
    found = Meeting(tmp_path)
    found.open(Opening(CONFIG.model_dump(mode="json"), KEYS, "127.0.0.1"))
    return found


def tell(meeting: Meeting, urls: dict[int, str], failures: Any = None) -> None:
    meeting.announce(0, urls, failures or {}, "agent")


def engine(meeting: Meeting, folder: Path) -> AnnouncedEngine:
    spec = dataclasses.replace(spec_for(folder, folder), number=0, host="", port=0, keys=KEYS)
    return AnnouncedEngine(spec, 0, meeting)


def test_what_a_node_is_to_start_is_for_this_user_alone_and_gone_with_the_run(meeting, tmp_path) -> None:
    file = tmp_path / "engines" / "run.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert meeting.opening() == Opening(CONFIG.model_dump(mode="json"), KEYS, "127.0.0.1")
    tell(meeting, {0: "http://127.0.0.1:9"})
    assert "admin" not in (tmp_path / "engines" / "node-0.json").read_text()
    meeting.close()
    assert meeting.opening() is None
    meeting.close()


def test_only_engines_of_this_start_of_the_run_are_found(meeting, tmp_path) -> None:
    assert meeting.announced(0, 0) is None
    tell(Meeting(tmp_path, "earlier"), {0: "http://127.0.0.1:9"})
    assert meeting.announced(0, 0) is None
    tell(meeting, {0: "http://127.0.0.1:10"})
    assert meeting.announced(0, 0) == "http://127.0.0.1:10"
    assert meeting.announced(1, 0) is None


def test_an_engine_is_waited_for_until_its_node_tells_where_it_is_and_it_answers(meeting, tmp_path) -> None:
    found = engine(meeting, tmp_path)
    with pytest.raises(EngineError, match=r"engine 0 on engine node 0 \(which has not told where it is\)"):
        found.wait_ready(0.3)
    with pytest.raises(EngineError, match="does not answer"):
        found.check_alive()
    with server() as url:
        threading.Timer(0.3, lambda: tell(meeting, {0: url})).start()
        found.wait_ready(20)
        assert found.url == url == found.spec.url and found.alive()
    assert not found.alive()


def test_a_lost_engine_is_dead_until_its_node_has_started_it_elsewhere(meeting, tmp_path) -> None:
    """Also where it goes on answering: it may be stuck."""
    with server() as first, server() as second:
        tell(meeting, {0: first})
        found = engine(meeting, tmp_path)
        assert found.alive()
        found.stop()
        assert meeting.lost(0) == first and not found.alive()
        found.find()
        assert not found.alive()
        tell(meeting, {0: second})
        assert not found.alive(), "its address is that of the lost one"
        found.find()
        assert found.url == second and found.alive()


def test_an_engine_that_its_node_has_given_up_is_not_waited_for(meeting, tmp_path) -> None:
    found = engine(meeting, tmp_path)
    threading.Timer(0.3, lambda: tell(meeting, {}, failures={0: "ValueError: no such backend"})).start()
    with pytest.raises(EngineError, match="does not come up: ValueError: no such backend"):
        found.wait_ready(20)


def test_one_that_answers_without_generating_is_started_again_after_two_updates(meeting, tmp_path) -> None:
    own = OwnEngine(EnginePart(engine=0, nodes=(0,), ranks=(0,), node=0), CONFIG, SubphaseClock(), meeting)
    with silent_server() as url:
        tell(meeting, {0: url})
        own.start(engine(meeting, tmp_path).spec)
        assert not own.answers_again() and meeting.lost(0) is None
        assert not own.answers_again() and meeting.lost(0) == url


def test_one_that_has_never_answered_is_left_to_its_node(meeting, tmp_path) -> None:
    tell(meeting, {0: "http://127.0.0.1:9"})
    engine(meeting, tmp_path).stop()
    assert meeting.lost(0) is None


def test_what_a_file_said_last_holds_while_the_file_system_does_not_answer(meeting, monkeypatch) -> None:
    tell(meeting, {0: "http://127.0.0.1:9"})
    assert meeting.announced(0, 0) == "http://127.0.0.1:9"

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("megatron_pmd.engine.engine_nodes.read_object", stale)
    assert meeting.announced(0, 0) == "http://127.0.0.1:9"


def test_a_node_that_was_started_with_another_start_of_the_run_finds_nothing(meeting, monkeypatch) -> None:
    monkeypatch.setenv(START, "7-2")
    meeting.open(Opening(CONFIG.model_dump(mode="json"), KEYS, "127.0.0.1"))
    assert meeting.opening("7-1") is None
    assert meeting.opening("7-2") == meeting.opening() is not None


def test_calls_go_to_where_the_engine_now_is(meeting, tmp_path) -> None:
    own = OwnEngine(EnginePart(engine=0, nodes=(0,), ranks=(0,), node=0), CONFIG, SubphaseClock(), meeting)
    with server() as first, server() as second:
        tell(meeting, {0: first})
        own.start(engine(meeting, tmp_path).spec)
        assert own.calls.spec.url == first and own.why_lost(probe=False) is None
        tell(meeting, {0: second})
        lost = own.why_lost(probe=False)
        assert lost is not None and "does not answer" in lost
        own.answers_again()
        assert own.calls.spec.url == second and own.why_lost(probe=False) is None


def test_a_wrong_option_of_sglang_is_refused_by_the_rank_that_would_wait_for_the_engine(meeting, tmp_path):
    wrong = override(CONFIG, ['rollout.sglang={"nonsense": 1}'])
    own = OwnEngine(EnginePart(engine=0, nodes=(0,), ranks=(0,), node=0), wrong, SubphaseClock(), meeting)
    spec = dataclasses.replace(engine(meeting, tmp_path).spec, rollout=wrong.rollout)
    with pytest.raises(ConfigError, match="nonsense is not an option"):
        own.start(spec)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (["rollout.placement=colocated", "rollout.staleness=0"], ConfigError, "placement=colocated: "),
        (['rollout.servers=["http://a:1"]', "rollout.ranks_per_engine=null"], ConfigError, "rollout.servers"),
        (["sync.transport=ipc"], ConfigError, "take weights by broadcast"),
        (["layout.engine_nodes=2"], LayoutError, "equal shares of 1 engines .*set layout.engine_nodes=1"),
        (["layout.engine_nodes=0"], ConfigError, "sync.transport=broadcast is for"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_engine_nodes_are_refused(settings, kind, words) -> None:
    with pytest.raises(kind, match=words):
        override(CONFIG, settings)
