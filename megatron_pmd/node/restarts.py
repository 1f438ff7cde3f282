"""Whether a Slurm job starts its run, and whether it is started again. It decides; node/job.py acts.

docs/slurm.md, "How a run ends", is the table of these decisions. Python's library alone: the batch host runs
it with its own Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_pmd.launch.history import History
from megatron_pmd.outcome import RunOutcome, Status


@dataclass(frozen=True)
class Limits:
    attempts: int = 20
    """Starts of one submission."""
    crashes: int = 3
    """Failures without a new checkpoint between them."""


class Action(str, Enum):  # noqa: UP042  # enum.StrEnum needs Python 3.11
    RUN = "run"
    REQUEUE = "requeue"
    END = "end"
    """The job ends; later jobs of its chain start."""
    STOP = "stop"
    """The job ends, and later jobs of its chain do not start."""


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str = ""
    """For people."""
    exit_code: int = 0
    """Of the batch script."""


def is_restart(history: History, job: str, restart_count: int) -> bool:
    """Whether the job has been here before: Slurm or after_end() started it again.

    Slurm also calls a job restarted whose first start it lost before the batch script ran.
    """
    return restart_count > 0 and job in history.jobs


def before_start(
    history: History, *, restart: bool, chain_link: bool, checkpoint: str | None, limits: Limits
) -> Decision:
    """Whether the job starts the run. history: every attempt in it has an outcome.

    A restart goes on counting. A new job counts from nothing; one of a chain has nothing to do when the job
    before it completed or stopped the run.
    """
    if restart:
        reason = limit_reached(history, checkpoint, limits)
        return Decision(Action.STOP, reason, 1) if reason else Decision(Action.RUN)
    if chain_link and history.stopped:
        reason = f"not started: an earlier job of this chain stopped: {history.stopped}"
        return Decision(Action.END, reason, 1)
    last = history.last.outcome if history.last else None
    if chain_link and last and last.status is Status.COMPLETE:
        return Decision(Action.END, "not started: an earlier job of this chain completed the run")
    return Decision(Action.RUN)


def after_end(
    history: History,
    outcome: RunOutcome,
    *,
    checkpoint: str | None,
    limits: Limits,
    slurm_ended_it: bool = False,
    preempted: bool = False,
) -> Decision:
    """What becomes of the job after an attempt, the last of `history`.

    slurm_ended_it: the job was cancelled, or is past its time, or a node of it is lost; where it is to be
    started again Slurm does so. preempted: the job ends within the time that a preemption leaves it; Slurm
    requeues only one that it ends itself after that.
    """
    goes_on = preempted and outcome.status is Status.INTERRUPTED
    if outcome.status in (Status.COMPLETE, Status.INTERRUPTED) and not goes_on:
        return Decision(Action.END, exit_code=outcome.exit_code)
    if not (outcome.may_start_again or goes_on):
        return Decision(Action.STOP, str(outcome), outcome.exit_code)
    if slurm_ended_it:
        return Decision(Action.END, "not requeued: Slurm has ended the job itself", outcome.exit_code)
    reason = limit_reached(history, checkpoint, limits)
    if reason:
        return Decision(Action.STOP, reason, 1)
    return Decision(Action.REQUEUE, exit_code=outcome.exit_code)


def limit_reached(history: History, checkpoint: str | None, limits: Limits) -> str:
    """Why the run is not started once more; empty: it is. checkpoint: the newest there is."""
    crashes = history.crashes_at(checkpoint)
    if len(crashes) >= limits.crashes:
        last = crashes[-1].outcome.reason if crashes[-1].outcome else ""
        return f"crashed {len(crashes)} times without a new checkpoint; the last reason: {last}"
    begun = len(history.since_submission)
    if begun >= limits.attempts:
        return (
            f"started {begun} times since it was submitted, not complete: PMD_MAX_ATTEMPTS={limits.attempts}"
        )
    return ""


def judge(
    written: RunOutcome | None,
    *,
    exit_code: int | None,
    slurm_ended_it: bool,
    given_up: Sequence[str] = (),
) -> RunOutcome:
    """The outcome of an attempt, from what its nodes wrote and what the batch script and Slurm know.

    exit_code: srun's; None: the batch script did not live to see it. given_up: nodes of the attempt that
    Slurm has given up. A node that receives SIGTERM writes `interrupted`. Slurm sends SIGTERM when the job is
    cancelled, but also to the nodes that are left when one of them is lost or its process is killed: then the
    attempt has failed.
    """
    if written is not None and written.status is not Status.INTERRUPTED:
        return written
    if written is not None and slurm_ended_it and not given_up:
        return written
    if given_up:
        return RunOutcome(Status.FAILED, f"lost: {', '.join(given_up)}")
    if exit_code is None:
        return RunOutcome(Status.FAILED, "the batch script was killed, or its node, the first, was lost")
    reason = f"the job step ended with exit code {exit_code}"
    if written is not None:
        reason += ", and nobody cancelled the job: one of its processes was killed"
    return RunOutcome(Status.FAILED, reason)
