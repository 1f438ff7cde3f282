"""The engine of a rank: what can be asked of it once it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.config import override
from megatron_pmd.engine.engine_nodes import Meeting
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.engine.placement import EnginePart
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from recipes import recipe
from tests.engine.live_engine import spec_for


def test_a_call_of_a_killed_engine_fails_as_that_of_a_dead_one_and_ends_no_rank(tmp_path: Path) -> None:
    """The phases behind the one in which it was lost still call it, until the next update starts it again."""
    config = override(
        recipe("tiny_moe_cpu"),
        [
            'rollout.servers=["http://127.0.0.1:9"]',
            "rollout.ranks_per_engine=null",
            "sync.transport=broadcast",
        ],
    )
    own = OwnEngine(
        EnginePart(engine=0, nodes=(0,), ranks=(0, 1), node=0), config, SubphaseClock(), Meeting(tmp_path)
    )
    own.start(spec_for(tmp_path, tmp_path))
    own.kill()
    for call in (own.calls.go_on, own.calls.flush_cache, own.calls.weight_version):
        with pytest.raises(EngineError, match=r"engine 3 .*Connection refused"):
            call()
    assert own.why_lost(probe=True) is not None
    before = own.calls
    own.start(spec_for(tmp_path, tmp_path))
    assert own.calls is not before
