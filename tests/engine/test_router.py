"""When a run's router is started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import Rollout
from megatron_pmd.engine import router
from megatron_pmd.engine.router import Router


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
