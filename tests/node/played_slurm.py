"""A Slurm that is played by programs on the PATH, and the batch script's two calls of node/job.py.

`scontrol` and `sinfo` answer what a test puts down, and note what they are asked.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_pmd.launch.history import History
from megatron_pmd.launch.progress import describe
from megatron_pmd.node.job import main
from megatron_pmd.outcome import RunOutcome

SCONTROL = """
echo "$*" >>"$PLAYED/calls"
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show job") cat "$PLAYED/job" ;;
requeue*) [ ! -e "$PLAYED/no_requeue" ] || { cat "$PLAYED/no_requeue" >&2; exit 1; } ;;
esac
"""
SINFO = 'cat "$PLAYED/nodes"'


@dataclass
class Played:
    """A cluster of nodes n1 to n3, and one run on it; the job has n1 and n2."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tau005"

    @property
    def state(self) -> Path:
        return self.run / "launch"

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def node_states(self, **states: str) -> None:
        (self.folder / "nodes").write_text("".join(f"{node} {word}\n" for node, word in states.items()))

    def job_state(self, word: str, end: str = "2026-05-01T12:00:00", preempted: str = "None") -> None:
        (self.folder / "job").write_text(
            f"JobId=5 JobName=tau005\n   JobState={word} Reason=None\n"
            f"   StartTime=2026-05-01T08:00:00 EndTime={end} Deadline=N/A\n"
            f"   PreemptEligibleTime=2026-05-01T08:00:00 PreemptTime={preempted}\n"
            "   StdOut=/shared/my runs/log.out\n"
        )

    def calls(self, of: str = "") -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(of)]

    def checkpoint(self, name: str) -> None:
        (self.run / "checkpoints" / name).mkdir(parents=True)

    def written(self, outcome: RunOutcome) -> None:
        """What the attempt's nodes would write."""
        outcome.write(self.state / "outcome.json")

    def history(self) -> History:
        return History.read(self.state / "history.jsonl")

    def outcomes(self) -> list[str | None]:
        return [each.outcome.status.value if each.outcome else None for each in self.history().attempts]

    def described(self) -> str:
        """`megatron-pmd status`, where Slurm no longer knows the job."""
        self.program("squeue", "true")
        return "\n".join(describe(self.run))


@dataclass
class Start:
    """The batch script's two calls."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    log: str = ""
    """What the last call wrote into the job's log."""

    def begin(self, *, job: int = 5, restarts: int = 0, link: int | None = None) -> dict[str, str]:
        """Variables that the batch script gets; {"exit": CODE} when it ends."""
        self.monkeypatch.setenv("SLURM_JOB_ID", str(job))
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        if link is not None:
            self.monkeypatch.setenv("PMD_CHAIN_LINK", str(link))
        assert main(["begin"]) == 0
        printed = self.capsys.readouterr()
        self.log = printed.err
        if printed.out.startswith("exit "):
            return {"exit": printed.out.split()[1]}
        words = [shlex.split(line)[1] for line in printed.out.splitlines()]
        found = dict(word.partition("=")[::2] for word in words)
        self.monkeypatch.setenv("PMD_ATTEMPT", found["PMD_ATTEMPT"])
        return found

    def end(self, code: int = 1) -> int:
        done = main(["end", str(code)])
        self.log = self.capsys.readouterr().err
        return done
