"""Two whole iterations with a real engine, as `megatron-pmd train` runs them: gpu_check's last checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

from megatron_pmd.config import RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import PmdError
from megatron_pmd.files import read_records
from tools.gpu_trial import configuration, shape_of

LIMIT_SECONDS = 900
"""An engine's first start on a device compiles its kernels."""


def iterations(folder: Path, *settings: str) -> RunConfig:
    """The trial's model under its engine: rollout, release, anchor, update, save, sync, and the same again.

    A random model spells nothing: a response is paid for its different characters, so that groups differ.
    """
    config = configuration(folder)
    own = [
        "name=gpu_check",
        "iterations=2",
        "batch.prompts_per_rollout=16",
        "batch.prompts_per_step=8",
        "batch.max_prompt_tokens=64",
        f"batch.max_response_tokens={shape_of(folder).response_tokens}",
        "data.train.task=spell_backward",
        "data.train.size=64",
        "reward.name=tools.gpu_iteration:different_characters",
        "checkpoint.every=1",
        "rollout.max_total_tokens=65536",
        "actor.experts.replay_routing=true",
    ]
    return override(config, [*own, *settings])


def different_characters(response: str, problem: Problem) -> float:
    """Their number over the length of the response."""
    return len(set(response)) / max(1, len(response))


def whole_iterations(folder: Path, *settings: str) -> dict[str, float]:
    """Train two iterations in a process of its own; seconds of the second one's phases, and its differences.

    Raises PmdError with what the run said.
    """
    file, runs = folder / "iterations.json", Path(mkdtemp(prefix="runs-", dir=folder))
    file.write_text(iterations(folder, *settings).model_dump_json())
    # from this folder, where the reward function is found
    words = ["-m", "megatron_pmd.cli.main", "train", str(file), "--runs", str(runs)]
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PmdError(f"not at its end after {LIMIT_SECONDS} s: {runs}/gpu_check") from None
    if done.returncode:
        raise PmdError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return figures_of(runs / "gpu_check")


def figures_of(run: Path) -> dict[str, float]:
    """Of a run's last iteration: seconds of each phase, and how far engine and actor are apart.

    The difference after a sync is |Δ log π| of the sampled tokens: mean, 99th percentile, largest.
    """
    metrics = [line for line in read_records(run / "metrics.jsonl") if line["kind"] == "iteration"][-1]
    seconds = {
        f"seconds of {line['phase']}": line["seconds"]
        for line in read_records(run / "ledger.jsonl")
        if line["iteration"] == metrics["iteration"] and line["seconds"] is not None
    }
    differences = {
        "mean difference": metrics["sync/mean_abs_difference"],
        "p99": metrics["mismatch/p99_abs"],
        "largest": metrics["sync/max_abs_difference"],
    }
    return seconds | differences
