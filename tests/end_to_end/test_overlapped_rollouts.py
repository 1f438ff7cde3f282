"""Rollouts sampled while others are trained on, by a real engine that is updated in place meanwhile."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from megatron_pmd.config import build, override
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.data.tokenizer import load_tokenizer
from megatron_pmd.node.worker import PROCESS_TITLE
from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.training.sampler_process import TITLE
from tests.end_to_end.command_line import (
    DEADLINE_SECONDS,
    CommandLine,
    descendants,
    wait_until,
)
from tests.forked_command import ForkedCommand

pytestmark = pytest.mark.slow

OVERLAP = [
    "rollout.placement=separate",
    "rollout.staleness=1",
    # whole runs that pause with retraction are in tests/slurm/test_lifecycle.py
    "rollout.pause=in_place",
    # slower than training: an update always meets running responses
    "rollout.max_running_requests=4",
    "batch.max_response_tokens=160",
    "checkpoint.hf_export=false",
    "data.evaluation=null",
    # the only one is written because of the signal
    "checkpoint.every=null",
    "iterations=5",
]


def test_rollouts_go_on_through_updates_a_killed_sampler_a_killed_engine_and_the_signal_to_save(
    command_line: CommandLine,
) -> None:
    """fp32: the actor's log-probability of every token sampled under its weights is the engine's to 1e-5, but
    for those that are marked as standing on a cache of earlier weights."""
    training = command_line.start("overlap", *OVERLAP)
    try:
        _wait_for_update(0, command_line, training)
        _process_of(training, TITLE).kill()
        _wait_for_update(1, command_line, training)
        _process_of(training, "sglang::scheduler").kill()
        _wait_for_update(2, command_line, training)
        wait_until(lambda: command_line.running_requests("overlap") > 1, "responses under way", training)
        _process_of(training, PROCESS_TITLE).send_signal(signal.SIGUSR1)
        output, _ = training.communicate(timeout=DEADLINE_SECONDS)
    finally:
        training.kill()
    assert training.returncode == 75, output
    assert f"process `{TITLE}` ended with status -9" in output and "It is started again" in output
    assert "1 engine(s) died and were started again" in output
    (checkpoint,) = (command_line.path("overlap") / "checkpoints").glob("iteration-*")
    saved = pq.read_table(checkpoint / "carried_over.parquet").to_pylist()
    command_line.run("overlap", *OVERLAP)
    _check_that_responses_go_on_from(saved, command_line)
    _check_order_versions_marks_and_log_probabilities(command_line)
    rollouts = command_line.path("overlap") / "rollouts"
    command_line.run("overlap-replayed", *OVERLAP, "--replay", str(rollouts))
    assert command_line.steps("overlap-replayed") == command_line.steps("overlap"), "as without kills"


def test_without_staleness_engines_of_an_engine_node_give_a_run_that_the_colocated_loop_repeats_bit_for_bit(
    command_line: CommandLine,
) -> None:
    """The engine node is a process beside the rank, which sends the weights there over the network."""
    own = ["iterations=2", "checkpoint.every=null", "checkpoint.hf_export=false"]
    apart = ["rollout.placement=separate", "layout.engine_nodes=1", "sync.transport=broadcast"]
    command_line.run("engine-node", *own, *apart)
    lines = [m for m in command_line.lines("engine-node", "metrics.jsonl") if m["kind"] == "iteration"]
    assert all(m["sync/max_abs_difference"] <= 1e-3 for m in lines)
    rollouts = command_line.path("engine-node") / "rollouts"
    for t in range(2):
        samples, _ = read_rollout(rollouts / f"{t}.parquet")
        assert {segment.weight_version for s in samples for segment in s.segments} == {t}
    command_line.run("engine-node-colocated", *own, "--replay", str(rollouts))
    assert len(command_line.steps("engine-node")) == 4
    assert command_line.steps("engine-node-colocated") == command_line.steps("engine-node")


def _check_order_versions_marks_and_log_probabilities(command_line: CommandLine) -> None:
    lines = [m for m in command_line.lines("overlap", "metrics.jsonl") if m["kind"] == "iteration"]
    assert [m["iteration"] for m in lines] == [0, 1, 2, 3, 4]
    given = json.loads((command_line.path("overlap") / "config.json").read_text())
    config = override(build(given), [f"model.path={command_line.folder / given['model']['path']}"])
    order = ProblemSets.load(config, load_tokenizer(config.model), print).train
    mixed, marked, steps = 0, [], command_line.steps("overlap")
    for t, line in enumerate(lines):
        samples, _ = read_rollout(command_line.path("overlap") / "rollouts" / f"{t}.parquet")
        assert [s.problem for s in samples[::4]] == [p.index for p in order.take(8)]
        versions = [[g.weight_version for g in s.segments] for s in samples]
        assert all(v == sorted(v) and t - 1 <= v[0] and v[-1] <= t for v in versions)
        several = sum(len(set(v)) > 1 for v in versions)
        mixed += several
        assert line["staleness/mixed_responses"] == pytest.approx(several / len(versions))
        segments = [g for s in samples for g in s.segments]
        marked.append(sum(g.tokens for g in segments if g.stale_cache))
        assert line["staleness/stale_cache"] == pytest.approx(marked[-1] / sum(g.tokens for g in segments))
        compared = sum(g.tokens for g in segments if g.weight_version == t and not g.stale_cache)
        assert line["sync/compared_tokens"] == compared
        for unit in ("responses", "tokens"):
            flow = {n: v for n, v in line.items() if n.startswith("ahead/") and n.endswith(unit)}
            came = sum(flow.get(f"ahead/{name}_{unit}", 0) for name in ("carried", "started"))
            assert came == sum(flow.values()) - came and flow[f"ahead/trained_{unit}"] > 0
        if line["sync/compared_tokens"]:
            assert line["sync/mean_abs_difference"] <= 1e-5 and line["sync/max_abs_difference"] <= 1e-3
        if compared < sum(g.tokens for g in segments):
            # the anchor is π_t, and not what the engine had when it sampled
            assert max(step["mismatch/max_abs"] for step in steps if step["iteration"] == t) > 1e-3
    assert len(steps) == 10 and all(0 < step["stale/effective_sample_size"] <= 1 for step in steps)
    assert mixed and sum(m["sync/compared_tokens"] for m in lines) > 0
    # the first rollout met no update, and the last one met that behind the only iteration since the resume
    assert marked[0] == 0 < marked[-1]


def _check_that_responses_go_on_from(saved: list[dict[str, Any]], command_line: CommandLine) -> None:
    """Two rollouts were under way: one that the trainer waited for or trained on, and the next."""
    iterations = sorted({row["begun"] for row in saved})
    assert len(iterations) == 2 and len(saved) == 64
    samples = {
        (t, sample.problem, sample.number): sample.response_tokens.tolist()
        for t in iterations
        for sample in read_rollout(command_line.path("overlap") / "rollouts" / f"{t}.parquet")[0]
    }
    begun = 0
    for row in saved:
        tokens = [token for turn in row["turns"] for token in turn["tokens"]]
        assert samples[row["begun"], row["problem"], row["number"]][: len(tokens)] == tokens
        begun += len(tokens) > 0
    assert begun


def _wait_for_update(iteration: int, command_line: CommandLine, training: ForkedCommand) -> None:
    what = f"the update after iteration {iteration}"
    wait_until(lambda: (iteration, "resume") in command_line.phases("overlap"), what, training)


def _process_of(training: ForkedCommand, title: str) -> psutil.Process:
    for process in descendants(training):
        with suppress(psutil.Error):  # it has ended meanwhile
            if " ".join(process.cmdline()).strip().startswith(title):
                return process
    raise AssertionError(f"no process `{title}`")
