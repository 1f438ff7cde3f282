"""What a rank says of itself can be read by its launcher, at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.heartbeat import RECORD_BYTES, Beat, Heartbeat
from megatron_pmd.shared_memory import own_memory


@pytest.fixture
def file() -> Path:
    return Path(own_memory("heartbeat", 1)[0])


def test_a_beat_says_phase_iteration_and_patience_and_each_is_another(file: Path) -> None:
    heartbeat = Heartbeat(file)
    heartbeat.enter("a phase of a longer name", 12, patience_seconds=600)
    first = Beat.read(file)
    assert first is not None and (first.phase, first.iteration, first.patience_seconds, first.waits) == (
        "a phase of a longer name", 12, 600, False
    )  # fmt: skip
    heartbeat.enter("update", 13, patience_seconds=60)
    second = Beat.read(file)
    assert second is not None and (second.phase, second.iteration) == ("update", 13), "nothing of the first"
    heartbeat.beat()
    assert Beat.read(file) != second
    assert file.stat().st_size == RECORD_BYTES


def test_a_rank_says_that_it_waits_until_it_does_no_more_also_after_a_failure(file: Path) -> None:
    heartbeat = Heartbeat(file)
    with pytest.raises(TimeoutError), heartbeat.waiting():
        during = Beat.read(file)
        raise TimeoutError
    after = Beat.read(file)
    assert during is not None and during.waits and after is not None and not after.waits


@pytest.mark.parametrize("content", [None, b"", b'{"phase": "upd'])
def test_of_a_rank_that_has_not_begun_or_is_just_writing_nothing_is_known(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "beat").write_bytes(content)
    assert Beat.read(tmp_path / "beat") is None


def test_without_a_file_a_heartbeat_does_nothing() -> None:
    heartbeat = Heartbeat()
    heartbeat.enter("update", 0, patience_seconds=1)
    with heartbeat.waiting():
        heartbeat.beat()
