"""How many programs a second the reward `code` runs in its sandboxes; figures are in docs/benchmarks.md.

    python -m tools.bench.code [--workers 2] [--runs 1000]

Three ways to the same verdicts: the reward with one test a sample, and with ten; and a bubblewrap and a
Python for every run, with the mounts of the reward's sandbox and without its limits. A program reads a number
and prints its successor. Starting the sandboxes is in the seconds alone.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import psutil
import typer

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rewards.sandbox import command

PROGRAM = "print(int(input()) + 1)"


def processor_seconds() -> float:
    """Of this process and its descendants, those that have ended too."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in [own, *own.children(recursive=True)])


def with_reward(runs: int, tests: int, workers: int) -> float:
    """Processor seconds that it takes."""
    cases = {"inputs": [f"{n}\n" for n in range(tests)], "outputs": [f"{n + 1}\n" for n in range(tests)]}
    problem = Problem(0, (), json.dumps(cases))
    with grading(Reward(name="code", workers=workers)) as rewards:
        rewards.grade([(PROGRAM, problem)] * workers)  # each starts its sandbox
        used = processor_seconds()
        verdicts = rewards.grade([(PROGRAM, problem)] * (runs // tests))
        used = processor_seconds() - used
    assert all(verdict.reward == 1.0 for verdict in verdicts), "a program that is right fails"
    return used


def with_a_python_each(runs: int, workers: int) -> float:
    """Processor seconds that it takes."""
    used = processor_seconds()
    # the same sandbox; its last argument is the program that stands ready
    line = [*command()[:-1], "-c", PROGRAM]

    def run(number: int) -> bytes:
        return subprocess.run(line, input=f"{number}\n".encode(), capture_output=True, check=True).stdout

    with ThreadPoolExecutor(workers) as threads:
        outputs = list(threads.map(run, range(runs)))
    assert outputs == [f"{number + 1}\n".encode() for number in range(runs)]
    return processor_seconds() - used


def main(
    workers: Annotated[int, typer.Option(help="sandboxes at a time")] = 2,
    runs: Annotated[int, typer.Option(help="programs to run, each way")] = 1000,
) -> None:
    ways: dict[str, Callable[[], float]] = {
        "one test a sample": lambda: with_reward(runs, 1, workers),
        "ten tests a sample": lambda: with_reward(runs, 10, workers),
        "bubblewrap and Python each": lambda: with_a_python_each(runs, workers),
    }
    for name, way in ways.items():
        began = time.monotonic()
        busy = way()
        seconds = time.monotonic() - began
        print(
            f"{name:28} {runs / seconds:6.0f} runs a second, {busy / runs * 1e3:5.2f} ms of a core each: "
            f"{2 * runs / busy:5.0f} a second on two whole cores"
        )


if __name__ == "__main__":
    typer.run(main)
