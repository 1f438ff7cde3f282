"""Runs of the real command line, small enough for a test: real ranks, real engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.convert.command_line import LEFT
from tests.forked_command import ForkedCommand

CALLS = httpx.Client(timeout=5, trust_env=False)
"""One for all polls: a client reads the certificates of all authorities when it is made."""
DEADLINE_SECONDS = 480
RECIPE = "tiny_moe_cpu"

SMALL = [
    "iterations=3",
    "batch.prompts_per_rollout=8",
    "batch.samples_per_prompt=4",
    "batch.prompts_per_step=4",
    "warm_start.steps=4",
    "warm_start.problems_per_step=16",
    "evaluation.prompts=8",
    "data.train.size=200",
    "data.evaluation.size=16",
    "reward.name=tests.end_to_end.rewards:letters",
    "checkpoint.every=1",
    "checkpoint.hf_export_every=2",
    "rollout.max_total_tokens=4096",
]


class CommandLine:
    """`megatron-pmd train RECIPE …` in its own session, with its runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._starts = folder, 0

    def start(self, name: str, *words: str) -> ForkedCommand:
        self._starts += 1
        output = self.folder / f"{name}-{self._starts}.out"
        given = [word.partition("=")[0] for word in words]
        # a word that gives a group as a whole takes the place of its parts
        small = [word for word in SMALL if not any(word.startswith(f"{key}.") for key in given)]
        words = ("train", RECIPE, f"name={name}", *small, *words)
        return ForkedCommand([*words], self.folder, output, LEFT | {"COLUMNS": "100"})

    def run(self, name: str, *words: str, expect: int = 0) -> str:
        """Train to the end; returns what was printed."""
        process = self.start(name, *words)
        try:
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            process.kill()
        assert process.returncode == expect, f"exit code {process.returncode}: {output}"
        return output

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        path = self.path(name) / file
        if not path.exists():
            return []
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Metrics of every optimizer step."""
        return [line for line in self.lines(name, "metrics.jsonl") if line["kind"] == "step"]

    def phases(self, name: str) -> list[tuple[int, str]]:
        return [(line["iteration"], line["phase"]) for line in self.lines(name, "ledger.jsonl")]

    def running_requests(self, name: str) -> int:
        """Responses that the run's engine is decoding, as it says itself; 0 while it does not answer.

        Of each, at least one token is sampled.
        """
        options = json.loads((self.path(name) / "logs" / "engine-0.log.yaml").read_text())
        headers = {"Authorization": f"Bearer {options['api-key']}"}
        url = f"http://{options['host']}:{options['port']}/v1/loads"
        try:
            loads = CALLS.get(url, headers=headers).json()["loads"]
        except httpx.HTTPError:
            return 0
        return sum(load["num_running_reqs"] for load in loads)

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.path(name) / "summary.json").read_text())


def wait_until(condition: Callable[[], Any], what: str, process: ForkedCommand) -> None:
    """Poll until the condition holds; fails with the process's output if it ends first or at the deadline."""
    limit = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < limit, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.05)


def descendants(process: ForkedCommand) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def still_there(processes: list[psutil.Process], seconds: float = 20.0) -> list[str]:
    """The command lines of those that have not ended after some seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
