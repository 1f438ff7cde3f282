"""What is known of a launched run: from its folder, and from Slurm where it still knows the job."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_pmd.errors import LaunchError
from megatron_pmd.files import read_object, read_records
from megatron_pmd.launch.submit import is_queued, job_ids, slurm

POLL_SECONDS = 0.5


def describe(run: Path) -> str:
    """Several lines: progress, jobs with the reason they wait for, attempts, outcome."""
    state = run / "launch"
    config, summary = read_object(state / "config.json"), read_object(run / "summary.json")
    planned = config["iterations"] if config else "?"
    iterations = [m for m in read_records(run / "metrics.jsonl") if m["kind"] == "iteration"]
    reward = f", reward {iterations[-1]['reward']:.3f}" if iterations and "reward" in iterations[-1] else ""
    lines = [f"{run}: {len(iterations)} of {planned} iterations{reward}"]
    for number in job_ids(run):
        lines.append(f"job {number}: {_in_slurm(number)}")
    attempts = _text(state / "attempts")
    if attempts:
        lines.append(f"attempts: {attempts}, the last on job {_text(state / 'job')}")
    outcome = _text(state / "outcome") or (summary or {}).get("status", "")
    if outcome:
        lines.append(f"outcome of the last attempt: {outcome}")
    for name, title in (("reason", "reason"), ("stopped", "stopped"), ("excluded_nodes", "excluded nodes")):
        if text := _text(state / name):
            lines.append(f"{title}: {text}")
    return "\n".join(lines)


def _in_slurm(number: str) -> str:
    answer = slurm("squeue", "-h", "-t", "all", "-j", number, "-o", "%T|%r|%N|%M", check=False)
    if not answer or "|" not in answer:
        return "no longer known to Slurm"
    state, reason, nodes, elapsed = answer.splitlines()[0].split("|")
    where = f" on {nodes}, {elapsed}" if nodes else ""
    return state + where + (f" ({reason})" if reason not in ("None", "") else "")


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def follow_log(run: Path, lines: int, *, follow: bool) -> Iterator[str]:
    """The last lines of the job's output; with follow, all that is added until the job has ended."""
    pointer = _text(run / "launch" / "log")
    if not pointer:
        raise LaunchError(f"{run}: nothing was launched here; give the folder of one run, e.g. runs/NAME")
    path = Path(pointer)
    while follow and not path.exists() and _any_queued(run):
        time.sleep(POLL_SECONDS)
    if not path.exists():
        raise LaunchError(f"{path}: no output yet; `megatron-pmd status {run}` says what the job waits for")
    with path.open(errors="replace") as file:
        yield from deque(file, maxlen=lines)
        while follow:
            queued = _any_queued(run)  # asked first: what is written until then is still read
            yield from file
            if not queued:
                return
            time.sleep(POLL_SECONDS)


def _any_queued(run: Path) -> bool:
    return any(is_queued(number) for number in job_ids(run))
