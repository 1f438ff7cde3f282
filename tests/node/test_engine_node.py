"""An engine node: it starts what the run wants, again what is lost, and ends with the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import override
from megatron_pmd.engine import recovery
from megatron_pmd.engine.engine_nodes import Meeting, Opening
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.sglang_server import EngineSpec
from megatron_pmd.errors import EngineError, LaunchError, LayoutError, PmdError
from megatron_pmd.node import engine_node
from megatron_pmd.observe.versions import software
from megatron_pmd.outcome import RunOutcome, Status
from recipes import recipe

CONFIG = override(
    recipe("tiny_moe_overlap_cpu"),
    ["layout.data=4", "layout.engine_nodes=2", "sync.transport=broadcast", "rollout.restarts=2"],
)
"""Four engines, two on each node."""


class Played:
    """In the place of EngineProcess; SGLang's own start is in tests/end_to_end and tests/slurm."""

    everyone: list[Played] = []
    fail: frozenset[int] = frozenset()
    """Engines that do not come up."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.url, self._alive = spec, spec.url, True
        Played.everyone.append(self)

    def alive(self) -> bool:
        return self._alive

    def wait_ready(self, deadline_seconds: float) -> None:
        if self.spec.number in Played.fail:
            raise EngineError("exited with status 1 at start")

    def stop(self) -> None:
        self._alive = False


class Served(threading.Thread):
    """serve() in a thread."""

    def __init__(self, run: Path, node: int) -> None:
        super().__init__(daemon=True)
        self._place = run, node
        self.error: PmdError | None = None
        self.start()

    def run(self) -> None:
        try:
            engine_node.serve(*self._place)
        except PmdError as error:
            self.error = error


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setattr(engine_node, "EngineProcess", Played)
    monkeypatch.setattr(engine_node, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(recovery, "RESTART_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(engine_node.signal, "signal", lambda *_: None)  # threads may not
    monkeypatch.setattr(Played, "everyone", [])
    found = Meeting(tmp_path)
    yield found
    found.close()


def opened(meeting: Meeting, keys: str, *settings: str, start: str = "") -> Keys:
    given = Keys(keys, keys)
    config = override(CONFIG, list(settings)).model_dump(mode="json")
    meeting.open(Opening(config, given, "127.0.0.1", start=start, software=software()))
    return given


def until(condition: Callable[[], Any]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_node_starts_its_share_of_the_engines_and_ends_them_with_the_run(meeting, tmp_path) -> None:
    keys = opened(meeting, "key")
    node = Served(tmp_path, 1)
    until(lambda: meeting.announced(1, 3))
    engines = Played.everyone
    assert [engine.spec.number for engine in engines] == [2, 3]
    assert [engine.spec.seed for engine in engines] == [CONFIG.seed + 2, CONFIG.seed + 3]
    assert [engine.spec.first_gpu for engine in engines] == [0, CONFIG.rollout.tensor_parallel]
    assert {engine.spec.host for engine in engines} == {"127.0.0.1"} and engines[0].spec.keys == keys
    assert [meeting.announced(1, number) for number in (2, 3)] == [engine.url for engine in engines]
    meeting.close()
    node.join(30)
    assert node.error is None and not any(engine.alive() for engine in engines)


def test_an_engine_that_dies_or_does_not_answer_is_started_again_elsewhere(meeting, tmp_path) -> None:
    opened(meeting, "key")
    Served(tmp_path, 0)
    until(lambda: meeting.announced(0, 1))
    dies, stuck = Played.everyone[:2]
    dies.stop()
    until(lambda: len(Played.everyone) == 3)
    meeting.tell_lost(1, stuck.url)
    until(lambda: len(Played.everyone) == 4)
    again = Played.everyone[2:]
    until(lambda: meeting.announced(0, 1) == again[1].url)
    assert [engine.spec.number for engine in again] == [0, 1] and not stuck.alive()
    assert meeting.announced(0, 0) == again[0].url


def test_a_new_start_of_the_run_gets_new_engines(meeting, tmp_path) -> None:
    """They have other keys, and may have other options."""
    opened(meeting, "first")
    Served(tmp_path, 0)
    until(lambda: len(Played.everyone) == 2)
    keys = opened(meeting, "second", "rollout.max_running_requests=7", start="7-2")
    until(lambda: Meeting(tmp_path, "7-2").announced(0, 1))
    before, after = Played.everyone[:2], Played.everyone[2:]
    assert not any(engine.alive() for engine in before)
    assert [engine.spec.keys for engine in after] == [keys, keys]
    assert {engine.spec.rollout.max_running_requests for engine in after} == {7}


def test_an_engine_that_does_not_come_up_is_given_up_alone(meeting, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Played, "fail", {0})
    opened(meeting, "key")
    node = Served(tmp_path, 0)
    until(lambda: meeting.failure(0, 0))
    assert meeting.failure(0, 0) == "exited with status 1 at start\nit was started again 2 times, in vain"
    assert meeting.announced(0, 0) is None
    [healthy] = [engine for engine in Played.everyone if engine.spec.number == 1]
    assert healthy.alive() and meeting.announced(0, 1) == healthy.url and node.error is None


def test_a_node_none_of_whose_engines_comes_up_ends_with_their_words(meeting, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Played, "fail", {0, 1})
    opened(meeting, "key")
    node = Served(tmp_path, 0)
    node.join(30)
    assert isinstance(node.error, EngineError)
    assert str(node.error).count("exited with status 1 at start\nit was started again 2 times, in vain") == 2
    assert not any(engine.alive() for engine in Played.everyone)


def test_a_node_that_comes_later_takes_the_place_of_one_that_is_there(meeting, tmp_path) -> None:
    opened(meeting, "key")
    first = Served(tmp_path, 0)
    until(lambda: meeting.announced(0, 1))
    before = list(Played.everyone)
    Served(tmp_path, 0)
    first.join(30)
    assert first.error is None and not any(engine.alive() for engine in before)
    after = Played.everyone[2:]
    assert [meeting.announced(0, number) for number in (0, 1)] == [engine.url for engine in after]
    assert all(engine.alive() for engine in after)


def test_a_node_with_other_software_than_the_drivers_is_named(meeting, tmp_path) -> None:
    config = CONFIG.model_dump(mode="json")
    other = software() | {"commit": "another"}
    meeting.open(Opening(config, Keys("key", "key"), "127.0.0.1", software=other))
    with pytest.raises(LaunchError, match=r"commit is .*, on the driver's node another"):
        engine_node.serve(tmp_path, 0)


def test_a_node_that_is_started_elsewhere_works_where_the_run_was_started(
    meeting, tmp_path, monkeypatch
) -> None:
    """Files of the configuration are given relative to that."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def right(response, problem):\n    return 1.0\n")
    config = override(CONFIG, ["reward.name=rewards.py:right"]).model_dump(mode="json")
    monkeypatch.chdir(tmp_path / "home")
    absent = str(tmp_path / "absent")
    meeting.open(Opening(config, Keys("key", "key"), "127.0.0.1", software=software(), folder=absent))
    with pytest.raises(
        LaunchError, match=r"absent, where paths of its configuration begin, and this machine"
    ):
        engine_node.serve(tmp_path, 0)
    meeting.open(Opening(config, Keys("key", "key"), "127.0.0.1", software=software(), folder=str(tmp_path)))
    served = Served(Path(".."), 0)
    until(lambda: meeting.announced(0, 1))
    assert Path.cwd() == tmp_path
    meeting.close()
    served.join(10)
    assert served.error is None and not served.is_alive()


def test_a_run_of_one_machine_takes_no_node_elsewhere(meeting, tmp_path) -> None:
    config = CONFIG.model_dump(mode="json")
    meeting.open(Opening(config, Keys("key", "key"), "127.0.0.1", host="elsewhere"))
    with pytest.raises(LaunchError, match="runs on elsewhere alone"):
        engine_node.serve(tmp_path, 0)


def test_a_node_that_the_layout_does_not_have_and_a_run_that_wants_none_are_named(
    meeting, tmp_path, monkeypatch
) -> None:
    opened(meeting, "key")
    with pytest.raises(LayoutError, match=r"--node 2: .* has layout.engine_nodes=2, counted from 0"):
        engine_node.serve(tmp_path, 2)
    meeting.close()
    monkeypatch.setattr(engine_node, "OPENING_SECONDS", 0.05)
    with pytest.raises(EngineError, match=r"did not want engines within 0.05 s; was it started"):
        engine_node.serve(tmp_path, 0)
    RunOutcome(Status.COMPLETE).write(tmp_path / "summary.json")
    with pytest.raises(LaunchError, match=r"is complete and wants no engines"):
        engine_node.serve(tmp_path, 0)
