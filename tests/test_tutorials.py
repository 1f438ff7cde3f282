"""The tutorials run as they stand on the page: blocks with a title are files, bash blocks are commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEADLINE_SECONDS = 900
"""For a page that takes three minutes on two idle cores."""


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in FENCE.findall((PROJECT / page).read_text())]


def follow(page: str, folder: Path) -> str:
    """Write the page's files and give its commands, in its order; returns what they printed."""
    printed = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT),
        "COLUMNS": "100",
    }  # fmt: skip
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=DEADLINE_SECONDS,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.text}\n{done.stdout}"
            printed.append(done.stdout)
    return "".join(printed)


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.mark.slow
def test_your_own_task_is_learned_reported_and_evaluated(tmp_path: Path):
    page = "docs/tutorials/your_own_task.md"
    printed = follow(page, tmp_path)
    assert blocks(page)[2].text in printed, "the problems that the page shows are those it makes"
    run = tmp_path / "runs/sorting"
    first, *_, last = metrics(run, "evaluation")
    assert last["mean_at_k"] > first["mean_at_k"]
    assert (run / "report.html").is_file()
    assert (run / "hf/iteration-8/config.json").is_file()
    assert "mean@4" in printed and "pass@4" in printed


@pytest.mark.slow
def test_from_grpo_to_pmd_trains_twice_on_one_rollout_and_prints_both(tmp_path: Path):
    printed = follow("docs/tutorials/from_grpo_to_pmd.md", tmp_path)
    pmd, grpo = (metrics(tmp_path / "runs" / name, "step") for name in ("pmd", "grpo"))
    assert len(pmd) == len(grpo) == 16
    # one rollout and one start: the first step, before anything has moved, sees the same groups
    assert pmd[0]["pmd/chi2_weight"] == pytest.approx(grpo[0]["pmd/chi2_weight"], rel=1e-6)
    assert pmd[-1]["gradient_norm"] != grpo[-1]["gradient_norm"]
    rows = re.findall(r"^(pmd|grpo) +\d+-\d+ ", printed, re.MULTILINE)
    assert rows == ["pmd"] * 4 + ["grpo"] * 4
