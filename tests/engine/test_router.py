"""When a run's router is started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import Rollout
from megatron_pmd.engine import router
from megatron_pmd.engine.router import Router, RouterSpec
from megatron_pmd.errors import EngineError


@pytest.mark.parametrize(
    ("supervised", "answering", "starts"), [(True, True, 1), (True, False, 2), (False, False, 2)]
)
def test_a_router_that_does_not_answer_is_replaced_though_its_supervisor_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, supervised: bool, answering: bool, starts: int
) -> None:
    """A supervisor outlives its server for a moment: in it the server would be taken for alive."""
    started: list[Any] = []

    class Process:
        url = "http://127.0.0.1:9"

        def __init__(self, spec: object) -> None:
            started.append(spec)

        def alive(self) -> bool:
            return supervised

        def wait_ready(self, seconds: float) -> None:
            pass

        def stop(self) -> None:
            pass

    monkeypatch.setattr(router, "RouterProcess", Process)
    monkeypatch.setattr(router, "answers", lambda url, seconds: answering and url.endswith("/liveness"))
    own = Router(Rollout(), tmp_path / "router.log", None)
    own.start([])
    own.start([])
    assert len(started) == starts


@pytest.mark.parametrize(
    ("failures", "starts"),
    [
        (['FailedToCreateHTTPListener("Address already in use (os error 98)")'], 2),
        (["no such option: --prometheus-host"], 1),
    ],
)
def test_a_router_whose_port_another_process_took_meanwhile_is_started_on_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: list[str], starts: int
) -> None:
    ports: list[int] = []
    left = list(failures)

    class Process:
        def __init__(self, spec: RouterSpec) -> None:
            ports.append(spec.port)

        def wait_ready(self, seconds: float) -> None:
            if left:
                raise EngineError(
                    f"router exited with status 1 at start; log: router.log, which ends:\n{left.pop()}"
                )

        def stop(self) -> None:
            pass

    monkeypatch.setattr(router, "RouterProcess", Process)
    own = Router(Rollout(), tmp_path / "router.log", None)
    if starts == 1:
        with pytest.raises(EngineError, match="no such option"):
            own.start([])
    else:
        own.start([])
    assert len(ports) == len(set(ports)) == starts


@pytest.mark.parametrize("answering", [("/liveness", "/health"), ("/health",), ("/liveness",)])
def test_engines_are_reached_where_the_router_answers_and_one_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answering: tuple[str, ...]
) -> None:
    """A router that the system has stopped runs, and answers nothing."""

    class Process:
        url = "http://127.0.0.1:9"

        def alive(self) -> bool:
            return True

    monkeypatch.setattr(router, "answers", lambda url, seconds: url.endswith(answering))
    own = Router(Rollout(), tmp_path / "router.log", None)
    own.process = Process()  # type: ignore[assignment]
    assert own.reaches(["http://127.0.0.1:8"]) == (len(answering) == 2)
