"""Whole runs by the command line on the emulated device, from rollouts that are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.batch import Segment
from megatron_pmd.config import RunConfig, override
from megatron_pmd.rollout_file import write_rollout
from recipes.tiny_moe_cpu import make_tokenizer
from tests.actor.tiny_models import config_for, with_routing

DEADLINE_SECONDS = 600
COMMON = [
    "iterations=2",
    "checkpoint.every=1",
    # the problems of these recorded rollouts are not those of the recorded tokens: only their number counts
    "batch.max_prompt_tokens=128",
    "batch.max_tokens_per_microbatch=200",
    # the rollouts are of float64 weights that no step has moved
    "sync.mean_log_prob_difference=10",
    "sync.p99_log_prob_difference=50",
]


class Runs:
    """A model, its rollouts and its runs, in one folder."""

    def __init__(self, folder: Path, model: Path, layout: dict[str, int], settings: list[str]) -> None:
        self.folder, self.model = folder, model
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer().save_pretrained(model)
        self.config: RunConfig = override(config_for(model, layout, precision="bf16"), [*COMMON, *settings])
        (folder / "run.json").write_text(self.config.model_dump_json())
        for iteration in range(self.config.iterations):
            self.write_rollout(iteration)

    def write_rollout(self, iteration: int, **changes: Any) -> None:
        """The reference's samples as if sampled under the weights of this iteration."""
        samples = torch.load(self.model / "reference.pt", weights_only=False).samples
        if self.config.actor.experts.replay_routing:
            samples = with_routing(samples)
        for number, sample in enumerate(samples):
            sample.reward = float(number % 3 == 0)
            sample.weight_version = iteration
            sample.segments = [Segment(len(sample.response_tokens), iteration)]
            vars(sample).update(changes)
        rollouts = self.folder / "rollouts"
        rollouts.mkdir(exist_ok=True)
        write_rollout(rollouts / f"{iteration}.parquet", samples, iteration)

    def train(self, name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`megatron-pmd train` of the run, with a device for each of its ranks."""
        devices = {"EMULATED_CUDA_DEVICES": str(self.config.layout.ranks), "COLUMNS": "200"}
        command = [
            "train",
            str(self.folder / "run.json"),
            f"name={name}",
            "--runs",
            str(self.folder / "runs"),
        ]
        command += ["--replay", str(self.folder / "rollouts"), *words]
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "megatron_pmd.cli", *command],
            env=os.environ | devices | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=DEADLINE_SECONDS,
        )  # fmt: skip

    def lines(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Metrics of a run, of one kind: `step` or `iteration`."""
        text = (self.folder / "runs" / name / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]
