"""What goes wrong on purpose: each time the run recovers, or ends with a message that names the culprit."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from megatron_pmd.node.worker import PROCESS_TITLE
from megatron_pmd.rollout_file import read_rollout
from tests.end_to_end.command_line import CommandLine, descendants, still_there, wait_until
from tests.forked_command import PROJECT, ForkedCommand

pytestmark = pytest.mark.slow

# untrained, the model rambles to the limit: a rollout of many seconds, to be interrupted
LONG_ROLLOUT = ["warm_start=null", "data.evaluation=null", "batch.max_response_tokens=256"]
LONG_ROLLOUT += ["rollout.max_total_tokens=16384", "iterations=1", "batch.max_tokens_per_microbatch=2048"]


def in_the_middle_of_a_rollout(command_line: CommandLine, name: str, process: ForkedCommand) -> None:
    """Wait until the engine samples several responses at a time: at its start it is asked for one."""
    wait_until(lambda: (0, "start") in command_line.phases(name), "the first sync", process)
    wait_until(lambda: command_line.running_requests(name) > 1, "responses under way", process)


def listening(process: ForkedCommand) -> set[tuple[str, str]]:
    """(kind of process, address) of every TCP socket on which the run listens, as the kernel says."""
    words = {
        "sglang::scheduler": "scheduler", "sglang::router": "router", "sglang.launch_server": "engine",
        PROCESS_TITLE: "rank",
    }  # fmt: skip
    found = set()
    for each in [psutil.Process(process.pid), *descendants(process)]:
        command = "agent" if each.pid == process.pid else " ".join(each.cmdline())
        kind = next((kind for word, kind in words.items() if word in command), command)
        for socket in each.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                found.add((kind, socket.laddr.ip))
    return found


def documented() -> set[tuple[str, str]]:
    """The same, of the table in docs/security.md: the columns `process` and `one node`."""
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", (PROJECT / "docs/security.md").read_text(), re.MULTILINE
    )
    return set(rows)


def test_an_engine_that_dies_while_generating_is_replaced_and_no_sample_counts_twice(
    command_line: CommandLine,
) -> None:
    process = command_line.start("engine_dies", *LONG_ROLLOUT)
    in_the_middle_of_a_rollout(command_line, "engine_dies", process)
    assert listening(process) == documented()
    schedulers = [p for p in descendants(process) if "sglang::scheduler" in " ".join(p.cmdline())]
    assert len(schedulers) == 1
    schedulers[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "died and were started again" in output
    assert "INFO:" not in output, "libraries tell what they do"
    samples, _ = read_rollout(command_line.path("engine_dies") / "rollouts" / "0.parquet")
    assert sorted((s.group, s.number) for s in samples) == [(g, n) for g in range(8) for n in range(4)]
    assert command_line.summary("engine_dies")["status"] == "complete"


def test_an_engine_that_never_comes_up_ends_the_run_with_its_last_words(command_line: CommandLine) -> None:
    output = command_line.run("no_engine", 'rollout.sglang={"quantization": "nonsense"}', expect=2)
    assert command_line.summary("no_engine")["error"] == "EngineRefused", "it would at every start"
    assert "refused: EngineRefused: engine 0" in output
    assert "nonsense" in output and "engine-0.log" in output


def test_ctrl_c_leaves_no_process_behind(command_line: CommandLine) -> None:
    process = command_line.start("interrupted", *LONG_ROLLOUT)
    wait_until(lambda: (0, "start") in command_line.phases("interrupted"), "the first sync", process)
    started = descendants(process)
    assert len([p for p in started if PROCESS_TITLE in " ".join(p.cmdline())]) >= 2
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted; the same command resumes it" in output
    assert command_line.summary("interrupted")["status"] == "interrupted"
    assert still_there(started) == []


def test_a_rollout_cut_short_by_the_signal_to_save_is_continued_and_not_repeated(
    command_line: CommandLine,
) -> None:
    """By a run that stops after the rollout: it leaves the file, and trains nothing."""
    process = command_line.start("cut", *LONG_ROLLOUT)
    in_the_middle_of_a_rollout(command_line, "cut", process)
    for rank in descendants(process):
        if PROCESS_TITLE in " ".join(rank.cmdline()):
            rank.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "the rollout was cut short" in output
    cut = pq.read_table(command_line.path("cut") / "checkpoints" / "iteration-0" / "carried_over.parquet")
    assert cut.num_rows == 32
    tokens = {
        (row["problem"], row["number"]): [t for turn in row["turns"] for t in turn["tokens"]]
        for row in cut.to_pylist()
    }
    assert sum(map(len, tokens.values())) > 0
    command_line.run("cut", "--stop-after", "rollout", *LONG_ROLLOUT)
    assert command_line.summary("cut")["status"] == "stopped"
    assert command_line.steps("cut") == []
    samples, _ = read_rollout(command_line.path("cut") / "rollouts" / "0.parquet")
    assert len(samples) == 32
    for sample in samples:
        begun = tokens[sample.problem, sample.number]
        assert sample.response_tokens[: len(begun)].tolist() == begun


def test_a_run_started_twice_goes_on_and_a_killed_rank_ends_it_and_is_named(
    command_line: CommandLine,
) -> None:
    process = command_line.start("rank_killed", *LONG_ROLLOUT)
    wait_until(lambda: (0, "start") in command_line.phases("rank_killed"), "the first sync", process)
    again = command_line.run("rank_killed", *LONG_ROLLOUT, expect=1)
    assert f"is being trained already, by process {process.pid} on" in " ".join(again.split())
    started = descendants(process)
    next(p for p in started if f"{PROCESS_TITLE} 1" in " ".join(p.cmdline())).kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "rank 1 failed: it ended with SIGKILL" in output
    assert "SIGKILL" in command_line.summary("rank_killed")["reason"], "also where the driver saw no more"
    assert still_there(started) == []


def test_a_rank_that_does_not_get_on_in_an_update_is_named_with_its_place_and_not_the_one_that_waits(
    live: Path, command_line: CommandLine
) -> None:
    words = ["algorithm.objective.name=tests.end_to_end.objectives:Hanging", "actor.timeout_seconds=6"]
    output = command_line.run("hanging", "--replay", str(live / "rollouts"), *words, expect=1)
    assert "rank 1 failed: it gave no sign of life for 6 s in update of iteration 0" in output
    reason = command_line.summary("hanging")["reason"]
    assert re.search(r"it stood at \S+tests/end_to_end/objectives.py:\d+ in loss; rank 1 was ended", reason)
    threads = (command_line.path("hanging") / "logs/where-rank-1-stood.txt").read_text()
    assert "forward.py" in threads, "how it came there"
