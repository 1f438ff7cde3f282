"""What is known of a launched run: from its folder, and from Slurm where it still knows the job."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_pmd.errors import LaunchError
from megatron_pmd.files import read_object, read_records
from megatron_pmd.launch.history import History
from megatron_pmd.launch.slurm import queue
from megatron_pmd.launch.submit import is_queued, job_ids
from megatron_pmd.outcome import RunOutcome

POLL_SECONDS = 0.5


def describe(run: Path) -> Iterator[str]:
    """Lines: progress, jobs with the reason they wait for, attempts, outcome.

    Raises LaunchError after the last line if Slurm did not say what the jobs do.
    """
    state = run / "launch"
    config = read_object(state / "config.json")
    planned = config["iterations"] if config else "?"
    iterations = [m for m in read_records(run / "metrics.jsonl") if m["kind"] == "iteration"]
    reward = f", reward {iterations[-1]['reward']:.3f}" if iterations and "reward" in iterations[-1] else ""
    yield f"{run}: {len(iterations)} of {planned} iterations{reward}"
    unanswered: LaunchError | None = None
    for number in job_ids(run):
        try:
            yield f"job {number}: {_in_slurm(number)}"
        except LaunchError as error:
            yield f"job {number}: unknown, Slurm does not answer"
            unanswered = error
    yield from _attempts(run)
    if excluded := _text(state / "excluded_nodes").split():
        yield f"excluded nodes: {' '.join(excluded)}"
    if unanswered:
        raise unanswered


def _attempts(run: Path) -> list[str]:
    """The starts of the run, and how the last one ended, in the words of its outcome."""
    history = History.read(run / "launch" / "history.jsonl")
    if history.last is None:  # no batch script has begun: the run was trained on this machine, or not at all
        outcome = RunOutcome.read(run / "summary.json")
        return [f"outcome: {outcome}"] if outcome else []
    lines = [f"attempts: {len(history.attempts)}, the last on job {history.last.job}"]
    # a job that was cancelled does not live to write its history; its nodes do
    written = RunOutcome.read(run / "launch" / "outcome.json")
    for attempt in reversed(history.attempts):
        if outcome := attempt.outcome or (written if attempt is history.last else None):
            lines.append(f"attempt {attempt.number} ended: {outcome}")
            break
    if history.stopped:
        lines.append(f"stopped: {history.stopped}")
    if history.not_requeued:
        lines.append(history.not_requeued)
    return lines


def _in_slurm(number: str) -> str:
    answer = queue(number, "%T|%r|%N|%M")
    if not answer:
        return "no longer known to Slurm"
    state, reason, nodes, elapsed = answer.splitlines()[0].split("|")
    where = f" on {nodes}, {elapsed}" if nodes else ""
    return state + where + (f" ({reason})" if reason not in ("None", "") else "")


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def follow_log(run: Path, lines: int, *, follow: bool) -> Iterator[str]:
    """The last lines of the job's output; with follow, all that it and later jobs of its chain add."""

    def newest() -> Path:
        """Every job of a chain writes into a file of its own."""
        if pointer := _text(run / "launch" / "log"):
            return Path(pointer)
        raise LaunchError(f"{run}: nothing was launched here; give the folder of one run, e.g. runs/NAME")

    path, last_lines = newest(), lines
    while follow and not path.exists() and _any_queued(run):
        time.sleep(POLL_SECONDS)
    if not path.exists():
        raise LaunchError(f"{path}: no output yet; `megatron-pmd status {run}` says what the job waits for")
    while path.exists():
        with path.open(errors="replace") as file:
            yield from deque(file, maxlen=last_lines)
            while follow:
                # asked first: what is written until then is still read
                queued, current = _any_queued(run), newest()
                yield from file
                if not queued or (current != path and current.exists()):
                    break
                time.sleep(POLL_SECONDS)
        if not follow or current == path:
            return
        path, last_lines = current, sys.maxsize  # all of them


def _any_queued(run: Path) -> bool:
    """Also when Slurm does not say: a log is followed through a restart of its controller."""
    try:
        return any(is_queued(number) for number in job_ids(run))
    except LaunchError:
        return True
