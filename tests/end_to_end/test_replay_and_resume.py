"""Rollout files stand in for engines: a run can be repeated exactly, and a resumed one compared with it."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_pmd.rollout_file import read_rollout, write_rollout
from tests.end_to_end.command_line import CommandLine, descendants, still_there, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def replayed(live: Path, command_line: CommandLine) -> str:
    """The live run's rollouts, trained on again in a run of its own."""
    command_line.run("replayed", "--replay", str(live / "rollouts"))
    return "replayed"


def test_replaying_a_runs_rollouts_gives_the_same_numbers(replayed: str, command_line: CommandLine) -> None:
    assert len(command_line.steps("live")) == 6
    assert command_line.steps(replayed) == command_line.steps("live")


def test_killed_in_each_phase_a_run_goes_on_to_the_metrics_of_the_uninterrupted_one(
    live: Path, replayed: str, command_line: CommandLine
) -> None:
    """One run, killed seven times, each time at a random moment of the next phase; in the end its newest
    checkpoint is damaged, too.
    """
    moments = random.Random(0)
    phases = [phase for t, phase in command_line.phases(replayed) if t == 1]
    assert sorted(phases) == sorted(
        ["rollout", "release", "anchor", "update", "save", "export", "sync", "resume"]
    )
    phases.remove("export")  # it is due once in two iterations
    seconds = {line["phase"]: line["seconds"] for line in command_line.lines(replayed, "ledger.jsonl")}
    words = ("--replay", str(live / "rollouts"))
    folder = command_line.path("killed")

    def checkpoints() -> list[Path]:
        return sorted((folder / "checkpoints").glob("iteration-[0-9]"))

    def has_begun(after: str, completed: int, started: float) -> bool:
        """Whether this attempt, which rewrites the ledger first, has come to the end of the phase before."""
        ledger = folder / "ledger.jsonl"
        fresh = ledger.exists() and ledger.stat().st_mtime > started
        return fresh and any(p == after and t >= completed for t, p in command_line.phases("killed"))

    for before, phase in zip([phases[-1], *phases], phases, strict=False):
        completed = max((int(path.name[-1]) for path in checkpoints()), default=0)
        if phase != "rollout":  # which follows the iteration before
            completed = max(1, completed)  # late enough that there is a checkpoint to go on from
        begun = functools.partial(has_begun, before, completed, time.time())
        process = command_line.start("killed", *words)
        wait_until(begun, f"{phase}, which follows {before}", process)
        time.sleep(moments.uniform(0, seconds[phase]))
        if phase == phases[-1]:  # one to be damaged, and one to go on from
            wait_until(lambda: len(checkpoints()) == 2, "two checkpoints", process)
        started = descendants(process)
        os.killpg(process.pid, signal.SIGKILL)
        assert still_there(started) == [], phase
        process.communicate(timeout=60)
    newest = checkpoints()[-1]
    part = next(newest.glob("*.distcp"))
    os.truncate(part, part.stat().st_size // 2)  # as a node that loses power leaves it
    output = command_line.run("killed", *words)
    assert "resuming after" in output
    assert "DAMAGED CHECKPOINT" in output and newest.with_suffix(".damaged").is_dir()
    for kind in ("step", "iteration"):
        lines = [
            [
                {key: value for key, value in line.items() if not key.endswith("per_second")}
                for line in command_line.lines(name, "metrics.jsonl")
                if line["kind"] == kind
            ]
            for name in ("killed", replayed)
        ]
        assert lines[0] == lines[1] and len(lines[0]) == {"step": 6, "iteration": 3}[kind]
    assert command_line.summary("killed")["iterations"] == 3


def test_killed_in_sync_and_in_rollout_a_run_goes_on_as_its_rollouts_say(
    live: Path, command_line: CommandLine
) -> None:
    """Killed twice where live engines work; what it sampled, replayed in one go, gives the same numbers.

    And it sampled what the run of the same seed did that was never killed. The second time its launcher alone
    is killed: all others end with it.
    """
    for before in ((0, "save"), (0, "resume")):  # sync comes after the one, the next rollout after the other
        process = command_line.start("killed_twice")
        wait_until(lambda: before in command_line.phases("killed_twice"), f"{before}", process)  # noqa: B023
        started = descendants(process)
        if before == (0, "save"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        assert still_there(started) == []
        process.communicate(timeout=60)
        assert len(command_line.steps("killed_twice")) == 2
    command_line.run("killed_twice")
    command_line.run("never_killed", "--replay", str(command_line.path("killed_twice") / "rollouts"))
    assert len(command_line.steps("killed_twice")) == 6
    assert command_line.steps("killed_twice") == command_line.steps("never_killed")
    for file in ("0.parquet", "1.parquet", "2.parquet"):
        drawn = [
            read_rollout(run / "rollouts" / file)[0] for run in (live, command_line.path("killed_twice"))
        ]
        tokens, again = ([sample.response_tokens.tolist() for sample in samples] for samples in drawn)
        assert tokens == again


def test_log_probs_that_are_not_the_actors_stop_the_run_and_name_the_version(
    live: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    samples, _ = read_rollout(live / "rollouts" / "0.parquet")
    # what is read of a file cannot be written to
    samples[3].engine_log_probs = samples[3].engine_log_probs.copy()
    samples[3].engine_log_probs[0] += 0.01
    write_rollout(tmp_path / "0.parquet", samples, 0)
    output = command_line.run("stale", "--replay", str(tmp_path / "0.parquet"), "iterations=1", expect=1)
    assert "StaleWeights" in output and "weight version 0" in output
    assert command_line.summary("stale")["status"] == "failed"
    assert command_line.steps("stale") == []
    kept, _ = read_rollout(command_line.path("stale") / "rollouts" / "0.parquet")
    assert len(kept) == len(samples), "what was compared can be looked at"


def test_in_bf16_engines_and_actor_agree_within_its_bounds_and_a_third_of_a_nat_is_found(
    command_line: CommandLine, tmp_path: Path
) -> None:
    words = ["model.precision=bf16", "iterations=1", "data.evaluation=null", "checkpoint.hf_export=false"]
    command_line.run("bf16", *words)
    assert all(step["gradient_norm"] > 0 for step in command_line.steps("bf16"))
    [line] = [m for m in command_line.lines("bf16", "metrics.jsonl") if m["kind"] == "iteration"]
    assert 1e-5 < line["sync/mean_abs_difference"] < 0.05, "rounded to 8 bits, and no more than that"
    samples, _ = read_rollout(command_line.path("bf16") / "rollouts" / "0.parquet")
    for sample in samples:
        sample.engine_log_probs = sample.engine_log_probs - np.float32(0.3)
    write_rollout(tmp_path / "0.parquet", samples, 0)
    output = command_line.run("bf16_stale", *words, "--replay", str(tmp_path / "0.parquet"), expect=1)
    assert "StaleWeights" in output and "weight version 0" in output


def test_a_rollout_of_another_iteration_or_a_broken_file_is_refused(
    live: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    output = command_line.run("wrong", "--replay", str(live / "rollouts" / "2.parquet"), expect=2)
    assert "this is the rollout of iteration 2, not of 0" in output
    whole = (live / "rollouts" / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(whole[: len(whole) // 2])
    output = command_line.run("broken", "--replay", str(tmp_path), expect=2)
    assert "0.parquet: not a rollout file" in output
