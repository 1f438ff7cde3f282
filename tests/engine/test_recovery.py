"""The first start of the engines, with engines that say what the test tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.engine import own, recovery
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.handover import Handover
from megatron_pmd.engine.recovery import Recovery
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from recipes import recipe
from tests.engine.only_rank import OnlyRank


def wait_ready(config: RunConfig, folder: Path) -> Fleet:
    """A fleet whose engines answer."""
    control, clock = OnlyRank(), SubphaseClock()
    fleet = Fleet(config, control, folder, clock, cpu=True)
    Recovery(fleet, Handover(fleet, clock), control, config.rollout).wait_ready()
    return fleet


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Wait for a fleet whose engines end at their starts with these messages; the specs it started."""

    def start(*messages):
        left, specs = list(messages), []

        class Engine:
            def __init__(self, spec):
                self.spec, self.url = spec, spec.url
                specs.append(spec)

            def wait_ready(self, deadline_seconds):
                if left:
                    raise EngineError(left.pop(0))

            def check_alive(self):
                pass

            def stop(self):
                pass

        monkeypatch.setattr(own, "EngineProcess", Engine)
        monkeypatch.setattr(recovery, "RESTART_PAUSE_SECONDS", 0.0)
        assert wait_ready(recipe("tiny_moe_cpu"), tmp_path).urls == [specs[-1].url]
        return specs

    return start


def test_an_engine_that_lost_a_race_for_a_port_starts_again_on_another(start):
    first, second = start("[Errno 98] error while attempting to bind: Address already in use")
    assert first.port != second.port


def test_an_engine_that_cannot_start_is_not_started_twice(start):
    with pytest.raises(EngineError, match="no such quantization"):
        start("no such quantization")


SETTINGS = [
    "sglang serve: error: argument --quantization: invalid choice: 'nonsense' (choose from 'awq', 'fp8')",
    "ValueError: Model architectures ['NoSuch'] are not supported for now.",
    "AssertionError: tp_size must divide the number of key-value heads",
]
MACHINE = [
    "RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms",
    "OSError: [Errno 28] No space left on device",
]


@pytest.mark.parametrize("status", [1, 137])
@pytest.mark.parametrize(("words", "refuses"), [(SETTINGS, True), (MACHINE, False)])
def test_only_what_another_start_would_meet_again_is_refused(start, words, refuses, status):
    """Slurm starts a failed run again, and not one that a person has to mend first."""
    ended = f"engine 0 (http://127.0.0.1:9) exited with status {status} at start; log: x, which ends:"
    traceback = "Traceback (most recent call last):\n  raise ValueError(x)  # not the last words\n"
    for last_words in words:
        with pytest.raises(EngineError) as failure:
            start(f"{ended}\n{traceback}{last_words}\n[2026] the scheduler died")
        assert failure.value.refuses is refuses, last_words


def test_ports_that_are_never_free_end_the_start_with_both_messages(start):
    with pytest.raises(EngineError, match=r"(?s)port 1.*Address already in use.*in vain.*port 9"):
        start("port 1: Address already in use", *["port 9: Address already in use"] * 9)


def test_a_server_of_others_that_never_answers_ends_the_start_with_its_address(tmp_path):
    config = override(
        recipe("tiny_moe_cpu"),
        ['rollout.servers=["http://127.0.0.1:9"]', "rollout.ranks_per_engine=null", "sync.transport=disk",
         "rollout.start_timeout_seconds=0.1", "layout.data=1", "layout.expert=1"],
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"server 0 of rollout\.servers \(http://127\.0\.0\.1:9\) did not"):
        wait_ready(config, tmp_path)
