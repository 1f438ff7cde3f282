"""Starts a Slurm job's attempt and ends it: `python -m megatron_pmd.node.job begin`, then `end CODE`.

slurm/train.sbatch calls both on the batch host, outside the container, with the host's own Python: 3.9 or
newer, its library alone. restarts.py decides whether the job runs and whether it is started again; this file
reads and writes runs/NAME/launch/, asks Slurm, and has it requeue the job.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_pmd.errors import ConfigError, DataError, LaunchError, PmdError
from megatron_pmd.files import iterations_in
from megatron_pmd.launch.history import Attempt, History, append
from megatron_pmd.launch.slurm import slurm
from megatron_pmd.node.restarts import Action, Limits, after_end, before_start, is_restart, judge
from megatron_pmd.outcome import RunOutcome, Status

QUESTION_SECONDS = 20.0
"""For an answer of Slurm's that the job can do without."""
REQUEUE_SECONDS = 120.0

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT",
}  # fmt: skip
"""A job's states in which Slurm has ended it, or starts it again, although its script still runs."""

GIVEN_UP = re.compile("down|drain|fail")
"""In sinfo's word for a node that gets no more jobs."""


@dataclass(frozen=True)
class Job:
    """The job that the batch script belongs to, as Slurm and the script's variables tell."""

    number: str
    node_list: str
    run: Path
    """runs/NAME"""
    restart_count: int
    chain_link: bool
    nodes: int
    """That it was submitted for, where it may lose some and go on; else 0."""
    limits: Limits
    excluded_by_profile: str = ""
    """Nodes that no job of this cluster is to use, as Slurm writes them."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Raises ConfigError when a variable is missing, or not the number that it has to be."""
        _number(environment, "PMD_RANKS_PER_NODE", 1)  # the nodes' own, who would each fail of it
        try:
            return cls(
                number=environment["SLURM_JOB_ID"],
                node_list=environment["SLURM_JOB_NODELIST"],
                run=Path(environment["PMD_RUNS"]) / environment["PMD_NAME"],
                restart_count=_number(environment, "SLURM_RESTART_COUNT", 0),
                chain_link=bool(environment.get("PMD_CHAIN_LINK")),
                nodes=_number(environment, "PMD_JOB_NODES", 0),
                limits=Limits(
                    _number(environment, "PMD_MAX_ATTEMPTS", Limits.attempts),
                    _number(environment, "PMD_MAX_CRASHES", Limits.crashes),
                ),
                excluded_by_profile=environment.get("PMD_EXCLUDED_NODES", ""),
            )
        except KeyError as missing:
            raise ConfigError(
                f"{missing.args[0]} is not set: slurm/train.sbatch sets it, in a job of Slurm"
            ) from None

    @property
    def state(self) -> Path:
        """What is kept of the run's starts; status, logs and cancel read it."""
        return self.run / "launch"

    @property
    def history(self) -> Path:
        return self.state / "history.jsonl"

    def newest_checkpoint(self) -> str | None:
        """Name of it: iteration-N. One that is still being written has a suffix."""
        found = [path.name for path in iterations_in(self.run / "checkpoints").values()]
        return found[-1] if found else None

    def outcome(self) -> RunOutcome | None:
        """What the attempt's nodes wrote; None: nothing that can be read."""
        try:
            return RunOutcome.read(self.state / "outcome.json")
        except DataError as error:
            say(f"the outcome cannot be read, as if there were none: {error}")
            return None

    def details(self) -> str:
        """What Slurm knows of the job; empty when it does not answer."""
        try:
            return slurm("scontrol", "show", "job", self.number, deadline_seconds=QUESTION_SECONDS)
        except LaunchError as error:
            say(str(error))
            return ""

    def stop(self, reason: str) -> None:
        append(self.history, "stopped", reason=reason)
        say(reason)


def begin(job: Job) -> str:
    """Record this attempt; returns what the batch script evaluates: variables, or `exit CODE`.

    Raises LaunchError when Slurm cannot say which nodes the job has.
    """
    for folder in (job.state, job.run / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    history = History.read(job.history)
    if history.unreadable:
        say(f"{history.unreadable} line(s) of {job.history} cannot be read; they are not counted")
    restart = is_restart(history, job.number, job.restart_count)
    given_up: list[str] = []
    if restart and history.last:
        # the batch script goes with its node, before it can say that the node was lost
        given_up = given_up_nodes(history.last.nodes)
        exclude(job.state, given_up)
    history = close_unfinished(job, history, given_up)
    checkpoint = job.newest_checkpoint()
    decision = before_start(
        history, restart=restart, chain_link=job.chain_link, checkpoint=checkpoint, limits=job.limits
    )
    if decision.action is Action.STOP:
        job.stop(decision.reason)
    elif decision.action is Action.END:
        say(decision.reason)
    if decision.action is not Action.RUN:
        return f"exit {decision.exit_code}"
    nodes = slurm("scontrol", "show", "hostnames", job.node_list).split()
    if not nodes:
        raise LaunchError(f"scontrol show hostnames {job.node_list}: named no node")
    if not restart:
        append(job.history, "submitted", job=job.number)
    number = 1 + max((attempt.number for attempt in history.attempts), default=0)
    # what an earlier attempt left would be taken for this one's
    for name in ("outcome.json", "bad_nodes"):
        (job.state / name).unlink(missing_ok=True)
    shutil.rmtree(job.state / "preflight" / str(number), ignore_errors=True)
    append(
        job.history, "begun",
        attempt=number, job=job.number, nodes=job.node_list, checkpoint=checkpoint,
    )  # fmt: skip
    return _variables(job, Attempt(number, job.number, job.node_list, checkpoint), nodes)


def _variables(job: Job, attempt: Attempt, nodes: Sequence[str]) -> str:
    """Assignments for the batch script, and the files that `status`, `logs` and `cancel` read."""
    details = job.details()
    end = _field(details, "EndTime")
    try:
        end_time = int(datetime.strptime(end, "%Y-%m-%dT%H:%M:%S").timestamp())
    except ValueError:
        end_time = 0
    port = free_port(nodes[0], 20000 + int(job.number) % 10000)
    jobs = job.state / "jobs"
    if not jobs.exists() or job.number not in jobs.read_text().split():  # submitted by a person
        jobs.write_text(f"{job.number}\n")
    if output := _field(details, "StdOut"):
        (job.state / "log").write_text(f"{output}\n")
    say(
        f"attempt {attempt.number}, job {job.number}, nodes {' '.join(nodes)}, rendezvous {nodes[0]}:{port}, "
        f"ends {end or 'at a time that Slurm did not say'}, from {attempt.checkpoint or 'the start'}"
    )
    values = {
        "PMD_ATTEMPT": str(attempt.number),
        "PMD_STATE": str(job.state),
        "PMD_NODES": " ".join(nodes),
        "PMD_END_TIME": str(end_time),  # SLURM_JOB_END_TIME is missing before Slurm 23
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(port),
    }
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def close_unfinished(job: Job, history: History, given_up: Sequence[str]) -> History:
    """Give an attempt whose batch script was killed its outcome: what its nodes wrote, or `failed`."""
    last = history.last
    if last is None or last.outcome is not None:
        return history
    outcome = judge(job.outcome(), exit_code=None, slurm_ended_it=True, given_up=given_up)
    append(job.history, "ended", attempt=last.number, **outcome.as_json())
    say(f"attempt {last.number} ended: {outcome}")
    return History.read(job.history)


def end(job: Job, attempt: int, exit_code: int) -> int:
    """Record how the attempt ended, and requeue the job or not; returns the batch script's exit code.

    exit_code: srun's.
    """
    details = job.details()
    slurm_ended_it = _field(details, "JobState") in ENDED
    # within PreemptGraceTime the job goes on running after the SIGTERM
    preempted = not slurm_ended_it and _field(details, "PreemptTime") not in ("", "None", "N/A")
    written = job.outcome()
    # without an answer nobody knows whether the job was cancelled: one that was must not come back
    outcome = judge(written, exit_code=exit_code, slurm_ended_it=slurm_ended_it or preempted or not details)
    append(job.history, "ended", attempt=attempt, **outcome.as_json())
    if outcome != written:
        outcome.write(job.state / "outcome.json")
    say(f"attempt {attempt} ended: {outcome} (exit code {exit_code})")
    if outcome.status is Status.FAILED:
        exclude(job.state, given_up_nodes(job.node_list))
    decision = after_end(
        History.read(job.history),
        outcome,
        checkpoint=job.newest_checkpoint(),
        limits=job.limits,
        slurm_ended_it=slurm_ended_it,
        preempted=preempted,
    )
    if decision.action is Action.STOP:
        job.stop(decision.reason)
    elif decision.action is Action.REQUEUE:
        return decision.exit_code if requeue(job) else 1
    elif decision.reason:
        say(decision.reason)
    return decision.exit_code


def requeue(job: Job) -> bool:
    """Have Slurm start the job again, on other nodes than the excluded ones; whether it will."""
    try:
        slurm("scontrol", "requeue", job.number, deadline_seconds=REQUEUE_SECONDS)
    except LaunchError as error:
        # no stop: the next job of a chain goes on
        reason = f"could not be requeued; the next job of its chain goes on, or submit it again: {error}"
        append(job.history, "not_requeued", reason=reason)
        say(reason)
        return False
    excluded = _lines(job.state / "excluded_nodes")
    try:
        if job.nodes:  # one that has lost an engine node would come back without it
            slurm("scontrol", "update", f"JobId={job.number}", f"NumNodes={job.nodes}")
    except LaunchError as error:
        say(f"the job has fewer nodes from now on: {error}")
    try:
        if excluded:
            whole = ",".join([*filter(None, [job.excluded_by_profile]), *excluded])
            slurm("scontrol", "update", f"JobId={job.number}", f"ExcNodeList={whole}")
    except LaunchError as error:
        say(f"the excluded nodes may be used again: {error}")
    return True


def given_up_nodes(node_list: str) -> list[str]:
    """Those of these nodes to which Slurm gives no more jobs; none when it does not answer."""
    try:
        shown = slurm("sinfo", "-h", "-N", "-o", "%N %T", "-n", node_list, deadline_seconds=QUESTION_SECONDS)
    except LaunchError as error:
        say(f"{error}; no node is left out for its state in Slurm")
        return []
    states = (line.split(maxsplit=1) for line in shown.splitlines())
    return sorted({words[0] for words in states if len(words) == 2 and GIVEN_UP.search(words[1])})


def exclude(state: Path, given_up: Iterable[str]) -> None:
    """Leave out these nodes and those that the pre-flight named, from the next attempt on."""
    path = state / "excluded_nodes"
    excluded = _lines(path)
    for node in sorted({*given_up, *_lines(state / "bad_nodes")} - set(excluded)):
        excluded.append(node)
        say(f"node {node} is excluded from now on")
        path.write_text("".join(f"{name}\n" for name in excluded))


def free_port(host: str, first: int) -> int:
    """The first port from `first` on where nobody answers: on a shared node another job may have it."""
    port = first
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            return port
        port += 1


def say(text: str) -> None:
    """Into the job's log; the standard output is for the batch script."""
    print(f"megatron-pmd: {text}", file=sys.stderr, flush=True)


def _field(details: str, name: str) -> str:
    """A value of `scontrol show job`; paths may have spaces."""
    found = re.search(rf"^\s*{name}=(.*)$" if name == "StdOut" else rf"\b{name}=(\S*)", details, re.MULTILINE)
    return found[1] if found else ""


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a whole number")
    return int(text)


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_pmd.node.job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("begin", help="print what the batch script evaluates: variables, or `exit CODE`")
    commands.add_parser("end", help="requeue or not").add_argument("code", type=int, help="srun's exit code")
    given = parser.parse_args(words)
    try:
        job = Job.from_environment(os.environ)
        if given.command == "begin":
            print(begin(job))
            return 0
        return end(job, _number(os.environ, "PMD_ATTEMPT", 0), given.code)
    except (PmdError, OSError) as error:
        say(str(error))
        return RunOutcome.of(error).exit_code


if __name__ == "__main__":
    sys.exit(main())
