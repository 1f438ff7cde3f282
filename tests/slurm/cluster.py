"""A real Slurm of three nodes on this machine, and the commands of a user on its login node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from megatron_pmd.outcome import RunOutcome

PROJECT = Path(__file__).parents[2]
LAB = PROJECT / "slurm" / "lab"
NEMO_PYTHON = PROJECT / ".venv-nemo" / "bin" / "python"
DEADLINE_SECONDS = 300

SMALL = [
    "iterations=4",
    "batch.prompts_per_rollout=8",
    "batch.samples_per_prompt=4",
    "batch.prompts_per_step=2",
    "warm_start.steps=4",
    "warm_start.problems_per_step=16",
    "data.evaluation=null",
    "data.train.size=200",
    "checkpoint.every=null",
    "checkpoint.hf_export=false",
    "rollout.max_total_tokens=4096",
    "reward.name=tests.end_to_end.rewards:letters",
]

LIVE = ["rollout.tensor_parallel=2"]
"""Of the run with an engine: it reaches over both nodes."""

PROFILE = """
partition = "batch"
gpus_per_node = 1
gpu = "cpu"
host_memory_gigabytes = 16
cpus_per_node = 2
time = "00:20:00"
signal_seconds = 120
python = "{python}"
shared = "{shared}"
setup = [{setup}]
max_crashes = 2
extra_sbatch = ["--comment=two words, # one value"]
[network]
socket_interfaces = ["ib0", "eth0"]
[preflight]
free_disk_gigabytes = 1
all_reduce_gigabytes_per_second = 0.001
[environment]
PYTHONPATH = "{project}"
{more}
"""


class Cluster:
    """The lab, one shared folder, and profiles for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared = folder, folder / "work"
        self.shared.mkdir(parents=True)
        os.environ["SLURM_CONF"] = str(folder / "lab" / "conf" / "slurm.conf")

    def lab(self, command: str, *words: str) -> None:
        done = subprocess.run(
            [LAB, command, self.folder, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout

    def profile(self, name: str = "plain", setup: str = "", more: str = "") -> str:
        path = self.folder / f"{name}.toml"
        commands = ", ".join(json.dumps(line) for line in filter(None, [setup]))
        path.write_text(
            PROFILE.format(
                python=sys.executable, shared=self.shared, project=PROJECT, setup=commands, more=more
            )
        )
        return str(path)

    def command(self, *words: str, python: str | Path = sys.executable, expect: int = 0) -> str:
        """`megatron-pmd …`; returns what was printed."""
        done = subprocess.run(
            [python, "-m", "megatron_pmd.cli.main", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    def launch(self, name: str, profile: str, *words: str, **options: Any) -> str:
        """Submit the tiny recipe; returns the number of the first job."""
        where = ("--cluster", profile, "--through", options.pop("through", "sbatch"))
        self.command("launch", "tiny_moe_cpu", *where, f"name={name}", *SMALL, *words, **options)
        return (self.run(name) / "launch" / "jobs").read_text().split()[0]

    def run(self, name: str) -> Path:
        return self.shared / "runs" / name

    def text(self, name: str, file: str) -> str:
        path = self.run(name) / file
        return path.read_text() if path.exists() else ""

    def log(self, name: str) -> str:
        return "".join(path.read_text(errors="replace") for path in (self.run(name) / "logs").glob("*.out"))

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        text = self.text(name, file)
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Metrics of every optimizer step."""
        return [line for line in self.lines(name, "metrics.jsonl") if line["kind"] == "step"]

    def phases(self, name: str) -> list[tuple[int, str]]:
        return [(line["iteration"], line["phase"]) for line in self.lines(name, "ledger.jsonl")]

    def outcome(self, name: str) -> RunOutcome | None:
        """Of the run's last attempt."""
        return RunOutcome.read(self.run(name) / "launch" / "outcome.json")

    def begun(self, name: str) -> list[dict[str, Any]]:
        """The starts of a run, as its history has them."""
        return [line for line in self.lines(name, "launch/history.jsonl") if line["event"] == "begun"]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        shown = slurm("scontrol", "show", "job", number, "--oneliner")
        return dict(word.partition("=")[::2] for word in shown.split())

    def wait(self, condition: Callable[[], Any], what: str, name: str, hasten: bool = True) -> None:
        """Poll until the condition holds; shows the log at the deadline.

        `hasten` starts requeued jobs at once, where Slurm waits two minutes. Without it a job that lost its
        first node starts on it again after Slurm's second try to end it there, a minute after the first: it
        would end the new start.
        """
        limit, asked = time.monotonic() + DEADLINE_SECONDS, 0.0
        while not condition():
            assert time.monotonic() < limit, (
                f"not in time: {what}\n{slurm('squeue')}\n{self.log(name)[-6000:]}"
            )
            if hasten and time.monotonic() > asked + 2:
                asked = time.monotonic()
                hasten_requeued_jobs()
            time.sleep(0.05)

    def wait_for_end(self, number: str, name: str) -> str:
        """The state a job ends in."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def has_ended() -> bool:
            time.sleep(0.5)
            return self.job(number)["JobState"] in ended

        self.wait(has_ended, f"the end of job {number}", name)
        return self.job(number)["JobState"]


def slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints."""
    whole = os.environ | (environment or {})
    done = subprocess.run(command, env=whole, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def hasten_requeued_jobs() -> None:
    """Start jobs in two seconds that Slurm holds back for two minutes after a requeue.

    Not at once: a start in the second of the requeue would be of a job whose credential the nodes have just
    been told to refuse. slurmctld kills it: "non-startable batch job: Job credential revoked".
    """
    for line in slurm("squeue", "-h", "-t", "PENDING", "-o", "%A %r %S").splitlines():
        number, reason, start = line.split(maxsplit=2)
        if reason != "BeginTime" or start == "N/A":  # the latter while the requeue is under way
            continue
        if datetime.fromisoformat(start) > datetime.now() + timedelta(seconds=10):
            slurm("scontrol", "update", f"JobId={number}", "StartTime=now+2")


def processes_on_nodes() -> list[str]:
    """Command lines of all that runs in the nodes' networks, but for their slurmd."""
    return [
        f"{node}: {line}"
        for node in ("n1", "n2", "n3")
        for line in _command_lines(node).values()
        if not line.startswith("slurmd ")
    ]


def started_by_slurm(words: str) -> list[psutil.Process]:
    """The processes with these words in their command lines that a slurmstepd has started itself."""
    numbers = [
        number
        for node in ("n1", "n2", "n3")
        for number, line in _command_lines(node).items()
        if words in line
    ]
    processes = [psutil.Process(number) for number in numbers]
    return [process for process in processes if process.parent().name() == "slurmstepd"]


def _command_lines(node: str) -> dict[int, str]:
    """Of all that runs in a node's network, by process id."""
    found = {}
    for number in slurm("ip", "netns", "pids", f"pmdlab-{node}").split():
        try:
            line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if line:
            found[int(number)] = line
    return found
