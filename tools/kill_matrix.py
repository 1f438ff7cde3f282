"""Kills and stops processes of live runs, in every phase, and writes down what came of each.

    python -m tools.kill_matrix OUT --trials 60 [--seed 0] [--overlapped]

One run goes through all trials: of two ranks and an engine, or with --overlapped of two ranks and two engine
nodes that sample ahead. A start that has ended is followed by the next, which goes on from the checkpoint. In
the end all rollouts that the run drew are trained on once more by a run that nothing happens to; the metrics
of every step must be equal. OUT gets a line for each trial in trials.jsonl, a table in trials.md, and all
runs. What stays behind of a start that has ended, processes (and with them ports) or files in its TMPDIR and
in /dev/shm, is an outcome of its trial, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from megatron_pmd.heartbeat import Beat
from megatron_pmd.node.worker import PROCESS_TITLE
from megatron_pmd.shared_memory import PREFIX, SHARED_MEMORY, shared_memory_key
from megatron_pmd.training.sampler_process import TITLE

PROJECT = Path(__file__).parents[1]
NAME = "kill-matrix"
RUN = [
    "iterations=100000",
    f"name={NAME}",
    "batch.prompts_per_rollout=8",
    "batch.samples_per_prompt=4",
    "batch.prompts_per_step=4",
    "batch.max_response_tokens=64",
    "batch.max_tokens_per_microbatch=2048",
    "warm_start=null",
    "data.evaluation=null",
    "reward.name=tests.end_to_end.rewards:letters",
    "reward.workers=2",
    "checkpoint.every=1",
    "rollout.max_total_tokens=8192",
    "rollout.health_interval_seconds=5",
    "rollout.health_timeout_seconds=10",
    "rollout.request_timeout_seconds=30",
    "sync.timeout_seconds=30",
]
OVERLAPPED = [
    "layout.expert=1",
    "layout.engine_nodes=2",
    "rollout.placement=separate",
    "rollout.staleness=1",
    "rollout.ranks_per_engine=1",
    "sync.transport=broadcast",
]
KINDS: dict[str, Callable[[str], bool]] = {
    "launcher": lambda command: False,  # the process that was started: it is known
    "rank 0": lambda command: command == f"{PROCESS_TITLE} 0",
    "rank 1": lambda command: command == f"{PROCESS_TITLE} 1",
    "engine's supervisor": lambda command: "supervisor.py" in command and "launch_server" in command,
    "router's supervisor": lambda command: "supervisor.py" in command and "launch_server" not in command,
    "engine's server": lambda command: "launch_server" in command and "supervisor.py" not in command,
    "engine's scheduler": lambda command: command.startswith("sglang::scheduler"),
    "engine's detokenizer": lambda command: command.startswith("sglang::detokenizer"),
    "router": lambda command: command.startswith("sglang::router"),
    "reward worker": lambda command: command == "megatron-pmd reward worker",
    "checkpoint writer": lambda command: command == "megatron-pmd checkpoint writer",
    "checkpoint results": lambda command: command == "megatron-pmd checkpoint results",
    "resource tracker": lambda command: "resource_tracker" in command,
    "sampler": lambda command: command == TITLE,
    "engine node": lambda command: " engines " in command and " --node " in command,
}
OF_OVERLAPPED = {"sampler", "engine node"}
"""Kinds that no other run has."""
PHASES = ("rollout", "release", "anchor", "update", "save", "sync", "resume")
PHASES_OF_OVERLAPPED = ("rollout", "anchor", "update", "save", "sync")
"""The others take no time."""
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
DEADLINE_SECONDS = 300.0
"""For a run to go on or to end after a signal: the longest deadline that applies, an engine's start."""
LOOK_SECONDS = 0.003


@dataclass
class Trial:
    number: int
    kind: str
    signal: str
    phase: str
    """In which it was sent, as rank 0 said."""
    iteration: int
    outcome: str = ""
    """`went on`, `ended`, or `HUNG`."""
    seconds: float = 0.0
    """Until then."""
    said: str = ""
    """Why it ended, or what the console said when it went on."""
    left: tuple[str, ...] = ()
    """What stayed behind of a start that ended."""


class Run:
    """The run, started as often as it takes."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder, self.runs, self._settings = folder, folder / "runs" / NAME, settings
        self.temporary, self._output = folder / "tmp", folder / "console.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self.launcher: psutil.Process | None = None

    def start(self, *words: str) -> None:
        command = [sys.executable, "-m", "megatron_pmd.cli.main", "train", "tiny_moe_cpu", *self._settings]
        command += words
        self.temporary.mkdir(exist_ok=True)
        environment = os.environ | {
            "COLUMNS": "200", "PYTHONPATH": str(PROJECT), "TMPDIR": str(self.temporary),
        }  # fmt: skip
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.launcher, self._began = psutil.Process(self._process.pid), time.time()

    @property
    def runs_now(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def beat(self) -> Beat | None:
        """What rank 0 of this start does; None if it has not begun."""
        assert self.launcher is not None
        try:
            open_files = Path(f"/proc/{self.launcher.pid}/fd").iterdir()
            beats = sorted(int(f.name) for f in open_files if "memfd:heartbeat" in str(f.readlink()))
        except OSError:
            return None
        return Beat.read(Path(f"/proc/{self.launcher.pid}/fd/{beats[0]}")) if beats else None

    def processes(self) -> list[psutil.Process]:
        assert self.launcher is not None
        try:
            return [self.launcher, *self.launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def of_kind(self, kind: str) -> list[psutil.Process]:
        if kind == "launcher":
            return self.processes()[:1]
        found = []
        for process in self.processes()[1:]:
            try:
                command = " ".join(process.cmdline()).strip()
            except psutil.NoSuchProcess:
                continue
            if KINDS[kind](command):
                found.append(process)
        return found

    def kill(self) -> None:
        """All of this start at once."""
        if self.launcher is not None and self.runs_now:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            wait(lambda: not self.runs_now, 60)

    def reason(self) -> str:
        file = self.runs / "summary.json"
        if not file.exists() or file.stat().st_mtime < self._began:
            return "no summary"
        summary = json.loads(file.read_text())
        return f"{summary['status']}: {summary['reason']}"

    def said_since(self, position: int) -> str:
        with self._output.open("rb") as output:
            output.seek(position)
            return output.read().decode(errors="replace")

    @property
    def position(self) -> int:
        return self._output.stat().st_size if self._output.exists() else 0


def wait[T](condition: Callable[[], T], seconds: float) -> T | None:
    """The condition's value once it is true; None if it does not become so in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(LOOK_SECONDS)
    return None


def plan(trials: int, seed: int, overlapped: bool) -> Iterator[tuple[str, signal.Signals, str]]:
    """Every pair of a kind and a signal in turn, each in a phase that it was not sent in before.

    overlapped: with SIGKILL alone.
    """
    chance = random.Random(seed)
    phases: dict[tuple[str, signal.Signals], list[str]] = {}
    kinds = [kind for kind in KINDS if overlapped or kind not in OF_OVERLAPPED]
    known = PHASES_OF_OVERLAPPED if overlapped else PHASES
    pairs = [(kind, number) for kind in kinds for number in (SIGNALS[:1] if overlapped else SIGNALS)]
    for number in range(trials):
        if number % len(pairs) == 0:
            chance.shuffle(pairs)
        pair = pairs[number % len(pairs)]
        if not phases.get(pair):
            phases[pair] = chance.sample(known, len(known))
        yield *pair, phases[pair].pop()


class Matrix:
    def __init__(self, folder: Path, seed: int, settings: list[str]) -> None:
        self.folder, self.run, self._chance = folder, Run(folder, settings), random.Random(seed)
        self.trials: list[Trial] = []
        self._before: set[str] = set()

    def one(self, kind: str, number: signal.Signals, phase: str) -> Trial:
        """Send a signal to a process of a kind, at a random moment of a phase, and see what comes of it."""
        if not self.run.runs_now:
            self._before = self._files()
            self.run.start()
        target = self._at_a_random_moment(kind, phase)
        beat = self.run.beat()
        assert beat is not None
        trial = Trial(len(self.trials) + 1, kind, number.name, beat.phase, beat.iteration)
        there, position, began = self.run.processes(), self.run.position, time.monotonic()
        target.send_signal(number)
        done = wait(lambda: not self.run.runs_now or self._is_two_on(beat), DEADLINE_SECONDS)
        trial.seconds = round(time.monotonic() - began, 1)
        if not self.run.runs_now:
            trial.outcome, trial.said = f"ended ({self.run.exit_code})", self.run.reason()
            trial.left = self._left(there)
        else:
            trial.outcome = "went on" if done else "HUNG"
            trial.said = _what_was_mended(self.run.said_since(position))
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(signal.SIGCONT)  # whatever the run makes of it
            if not done:
                self.run.kill()
        self.trials.append(trial)
        with (self.folder / "trials.jsonl").open("a") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
        return trial

    def _at_a_random_moment(self, kind: str, phase: str) -> psutil.Process:
        """Wait for the phase, and somewhat into it; a process of this kind that is there then, or soon."""

        def in_phase() -> bool:
            assert self.run.runs_now, f"ended by itself: {self.run.reason()}"
            beat = self.run.beat()
            return beat is not None and beat.phase == phase

        assert wait(in_phase, DEADLINE_SECONDS), f"no {phase} within {DEADLINE_SECONDS:.0f} s"
        time.sleep(self._chance.uniform(0, self._typical(phase)))
        found = wait(lambda: self.run.of_kind(kind), 60)
        assert found, f"no {kind} within 60 s"
        return self._chance.choice(found)

    def _typical(self, phase: str) -> float:
        """How long it last took."""
        ledger = self.run.runs / "ledger.jsonl"
        lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        took = [line["seconds"] for line in lines if line["phase"] == phase and line["seconds"]]
        return min(took[-1], 5.0) if took else 0.5

    def _is_two_on(self, beat: Beat) -> bool:
        """Whether a whole iteration has begun and ended since."""
        now = self.run.beat()
        return now is not None and now.iteration >= beat.iteration + 2

    def _left(self, there: list[psutil.Process]) -> tuple[str, ...]:
        """Processes that do not end, and files that are there and were not, after a start has ended."""
        _, alive = psutil.wait_procs(there, timeout=20)
        left = []
        for process in alive:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"process {' '.join(process.cmdline())[:80]} ({process.status()})")
                process.kill()
            except psutil.NoSuchProcess:
                pass
        # those of a start that was begun after the signal end a moment later
        wait(lambda: not self._files() - self._before, 20)
        return (*left, *sorted(self._files() - self._before))

    def _files(self) -> set[str]:
        """What may be of this run: not of another run of this program."""
        ours = f"{PREFIX}{shared_memory_key(self.run.runs)}"
        memory = [
            p for p in SHARED_MEMORY.iterdir() if not p.name.startswith(PREFIX) or p.name.startswith(ours)
        ]
        files = [*self.run.temporary.iterdir(), *memory] if self.run.temporary.exists() else memory
        kept = "torchinductor"  # torch's cache of compiled code is to outlive a run
        return {
            f"{path} (a link without memory)" if not path.exists() else str(path)
            for path in files
            if not path.name.startswith(kept)
        }

    def finish(self) -> list[str]:
        """Replay what was drawn without any trouble; the differences between the metrics of both runs."""
        if not self.run.runs_now:
            self.run.start()
        self._at_a_random_moment("rank 0", "anchor")
        for rank in (*self.run.of_kind("rank 0"), *self.run.of_kind("rank 1")):
            rank.send_signal(signal.SIGUSR1)
        assert wait(lambda: not self.run.runs_now, DEADLINE_SECONDS), "it does not save and end"
        disturbed = _steps(self.run.runs)
        iterations = max(line["iteration"] for line in disturbed) + 1
        quiet = f"{NAME}-undisturbed"
        self.run.start(
            f"name={quiet}", f"iterations={iterations}", "checkpoint.every=null",
            "--replay", str(self.run.runs / "rollouts"),
        )  # fmt: skip
        wait(lambda: not self.run.runs_now, 3600)
        undisturbed = _steps(self.run.runs.with_name(quiet))
        if len(disturbed) != len(undisturbed):
            return [f"{len(disturbed)} steps, and {len(undisturbed)} undisturbed"]
        pairs = zip(disturbed, undisturbed, strict=True)
        return [f"iteration {a['iteration']}, step {a['step']}" for a, b in pairs if a != b]


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def _what_was_mended(text: str) -> str:
    """The line in which the console tells of it."""
    lines = [line.strip() for line in text.splitlines() if re.search("started again|given up|retried", line)]
    return lines[0] if lines else ""


def table(trials: list[Trial]) -> str:
    lines = ["| | process | signal | phase | outcome | seconds | what was said | left behind |"]
    lines.append("|--:|---|---|---|---|--:|---|---|")
    for trial in trials:
        said, left = trial.said.replace("|", "/").replace("\n", " ")[:160], ", ".join(trial.left) or "–"
        lines.append(
            f"| {trial.number} | {trial.kind} | {trial.signal} | {trial.phase} | {trial.outcome} "
            f"| {trial.seconds:.0f} | {said} | {left} |"
        )
    return "\n".join(lines) + "\n"


def main(
    out: Path,
    trials: Annotated[int, typer.Option(help="How many.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the moments, and of who gets which signal when.")] = 0,
    overlapped: Annotated[bool, typer.Option(help="A run that samples ahead.")] = False,
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    matrix = Matrix(out.resolve(), seed, [*RUN, *OVERLAPPED] if overlapped else RUN)
    try:
        for kind, number, phase in plan(trials, seed, overlapped):
            trial = matrix.one(kind, number, phase)
            print(
                f"{trial.number:3} {kind:22} {trial.signal} in {trial.phase:8} {trial.outcome:12} "
                f"{trial.seconds:6.1f} s  {trial.said[:200]}  {' '.join(trial.left)}",
                flush=True,
            )
            (out / "trials.md").write_text(table(matrix.trials))
        differences = matrix.finish()
    finally:
        matrix.run.kill()
    print(differences or "the metrics of all steps are those of an undisturbed run")
    sys.exit(bool(differences))


if __name__ == "__main__":
    typer.run(main)
