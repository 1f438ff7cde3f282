"""Sub-phases: a rank's clock, and what the ledger and the report make of several ranks' clocks."""

from __future__ import annotations

import json

import pytest

from megatron_pmd.observe.journal import Journal
from megatron_pmd.observe.report import write_report
from megatron_pmd.observe.subphases import Subphase, SubphaseClock, together
from megatron_pmd.outcome import RunOutcome, Status
from tests.observe.synthetic_run import make_config


def test_a_subphase_that_comes_again_adds_up_and_taking_begins_anew():
    looks = iter([(10, 1), (20, 2)])
    clock = SubphaseClock(lambda: next(looks))
    with clock("write", 100):
        pass
    with clock("load", memory=False):
        pass
    with clock("write", 50):
        pass
    write, load = clock.take()
    assert (write.name, write.bytes, write.actor_bytes, write.engine_bytes) == ("write", 150, 20, 2)
    assert (load.name, load.bytes, load.actor_bytes) == ("load", None, None)
    assert write.seconds > 0 and clock.take() == []


def test_a_subphase_that_fails_is_entered_all_the_same():
    clock = SubphaseClock()
    with pytest.raises(KeyError), clock("kv_cache"):
        raise KeyError
    assert [subphase.name for subphase in clock.take()] == ["kv_cache"]


def test_ranks_subphases_make_one_line_with_the_slowest_ones_seconds_and_all_memory():
    leader = [Subphase("kv_cache", 0.5, None, 100, 7), Subphase("write", 1.0, 2_000_000_000, 110, 8)]
    other = [Subphase("write", 2.0, 2_000_000_000, 90, 0)]
    kv_cache, write = together([leader, other])
    assert kv_cache == {
        "subphase": "kv_cache", "seconds": 0.5, "bytes": None, "gigabytes_per_second": None,
        "actor_bytes": 100, "engine_bytes": 7,
    }  # fmt: skip
    assert write == {
        "subphase": "write", "seconds": 2.0, "bytes": 2_000_000_000, "gigabytes_per_second": 1.0,
        "actor_bytes": 200, "engine_bytes": 8,
    }  # fmt: skip


def test_the_ledger_keeps_subphases_with_their_phase_and_the_report_lists_them_below_it(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.iteration(0)
    with journal.phase("sync") as phase:
        phase.subphases = together([[Subphase("part-of-sync", 0.25, 1_000_000)]])
    journal.finish(RunOutcome(Status.COMPLETE))
    [line] = map(json.loads, (tmp_path / "run" / "ledger.jsonl").read_text().splitlines())
    assert line["phase"] == "sync" and [p["subphase"] for p in line["subphases"]] == ["part-of-sync"]
    page = write_report(tmp_path / "run").read_text()
    assert page.index("</i>sync</th>") < page.index("part-of-sync</th>")
